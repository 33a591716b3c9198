"""The `[learner]` table is checked, and every threshold of the learner is in it."""

from dataclasses import fields
from pathlib import Path

import pytest

from predictor_service.learner.config import LearnerConfig
from promoe.config import Settings


def test_it_is_off_and_keeps_nothing_on_disk_unless_asked() -> None:
    config = Settings().section("learner", LearnerConfig)
    assert not config.enabled
    assert config.keep_on_disk is None


def test_it_is_read_from_the_command_line(tmp_path: Path) -> None:
    settings = Settings(None, ["learner.enabled=true", "learner.alpha=0.05", f"learner.keep_on_disk={tmp_path}"])
    config = settings.section("learner", LearnerConfig)
    assert config == LearnerConfig(enabled=True, alpha=0.05, keep_on_disk=tmp_path)


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("max_nbytes=0", "1 to"),
        ("max_steps=-1", "1 to"),
        ("watch_documents=0", "1 to"),
        ("half_life_s=0.0", "above 0"),
        ("learning_rate=inf", "above 0"),
        ("alpha=1.0", "between 0 and 1"),
        ("held_out_share=0.0", "between 0 and 1"),
        ("cpu_share=1.5", "up to 1"),
        ("serving_cpu_share=0.0", "above 0"),
        ("niceness=20", "0 to 19"),
        ("largest_difference=0.0", "up to 1"),
        ("min_gain=0.3", "below learner.largest_difference"),
        ("tolerated_loss=-0.1", "below learner.largest_difference"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(setting: str, allowed: str) -> None:
    name = setting.partition("=")[0]
    with pytest.raises(ValueError, match=rf"learner\.{name} is .*{allowed}"):
        Settings(None, [f"learner.{setting}"]).section("learner", LearnerConfig)


def test_every_setting_is_described() -> None:
    assert LearnerConfig.__doc__ is not None
    assert [field.name for field in fields(LearnerConfig) if field.name not in LearnerConfig.__doc__] == []
