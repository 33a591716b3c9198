"""`python -m predictor_service.settings`: whether a predictor's settings can be, in a moment and without a pack."""

import sys
from pathlib import Path

from predictor_service.config import AUTO, PredictorConfig
from predictor_service.learner.config import LearnerConfig
from predictor_service.plugins import plugin_named
from promoe.config import LogConfig, Settings
from promoe.settings_check import check_settings


def check(config_file: Path | None, assignments: list[str]) -> None:
    """What the pack has no say in.

    Raises:
        ValueError: the sentence.
    """
    settings = Settings(config_file, assignments)
    settings.section("log", LogConfig)
    settings.section("learner", LearnerConfig)
    config = settings.section("predictor", PredictorConfig)
    if config.predictor != AUTO:
        plugin_named(config.predictor)


if __name__ == "__main__":
    sys.exit(check_settings("predictor", check))
