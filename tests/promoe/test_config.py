"""Configuration: what is unknown, missing or of the wrong type is refused with what would be right."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.config import SECTIONS, LogConfig, Settings
from promoe.settings_check import check_settings


class Color(Enum):
    """For a setting with a fixed set."""

    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Sample:
    """One setting of every type a section may have."""

    name: str
    count: int = 3
    rate: float = 0.5
    folder: Path = Path("here")
    color: Color = Color.RED
    quiet: bool = False
    limit: int | None = None


def sample(*assignments: str, file: Path | None = None) -> Sample:
    """The section `store` as a Sample with these assignments."""
    return Settings(file, ("store.name=x", *assignments)).section("store", Sample)


def test_defaults_are_those_of_the_dataclass() -> None:
    assert sample() == Sample(name="x")
    assert Settings().section("log", LogConfig) == LogConfig()


def test_reads_every_type_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "promoe.toml"
    file.write_text(
        '[store]\nname = "y"\ncount = 7\nrate = 1\nfolder = "~/packs"\ncolor = "blue"\nquiet = true\nlimit = 9\n'
        '[log]\nlevel = "debug"\n'
    )
    settings = Settings(file)
    assert settings.section("store", Sample) == Sample(
        name="y", count=7, rate=1.0, folder=Path.home() / "packs", color=Color.BLUE, quiet=True, limit=9
    )
    assert isinstance(settings.section("store", Sample).rate, float)
    assert settings.section("log", LogConfig).level == "debug"


def test_assignments_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    file = tmp_path / "promoe.toml"
    file.write_text("[store]\ncount = 7\nlimit = 9\n")
    assert sample("store.count=8", "store.count = 10", file=file) == Sample(name="x", count=10, limit=9)


def test_two_sections_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "promoe.toml"
    file.write_text('[store]\nname = "of the store"\n[compute]\nname = "of the node"\n')
    settings = Settings(file)
    assert settings.section("store", Sample).name == "of the store"
    assert settings.section("compute", Sample).name == "of the node"


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("store.name=unix:/run/a.sock", "name", "unix:/run/a.sock"),
        ("store.name=127.0.0.1:50051", "name", "127.0.0.1:50051"),
        ('store.name="quoted text"', "name", "quoted text"),
        ("store.name=123", "name", "123"),
        ("store.name=true", "name", "true"),
        ("store.name=a=b", "name", "a=b"),
        ("store.folder=2024-01-01", "folder", Path("2024-01-01")),
        ("store.folder=/data/packs", "folder", Path("/data/packs")),
        ("store.rate=1e9", "rate", 1e9),
        ("store.limit=1_000", "limit", 1000),
        ("store.color=blue", "color", Color.BLUE),
        ("store.quiet=true", "quiet", True),
    ],
)
def test_assignments_are_read_as_the_setting_needs(assignment: str, field: str, value: object) -> None:
    assert getattr(sample(assignment), field) == value


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])).map(str.strip))
def test_text_without_quotes_is_taken_as_it_is(text: str) -> None:
    if text[:1] not in ('"', "'"):
        assert sample(f"store.name={text}").name == text


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("store.colour=red", r"store\.colour is not a setting; known in \[store\]: color, count, folder, limit, name"),
        ("store.count=many", r"store\.count is 'many'; expected int"),
        ("store.count=1.5", r"store\.count is 1\.5; expected int"),
        ("store.count=true", r"store\.count is True; expected int"),
        ("store.rate=true", r"store\.rate is True; expected float"),
        ("store.quiet=1", r"store\.quiet is 1; expected bool"),
        ("store.limit=none", r"store\.limit is 'none'; expected int"),
        ("store.color=green", r"store\.color is 'green'; allowed: red, blue"),
        ("store.count=1\nquiet=true", r"store\.count is '1\\nquiet=true'; expected int"),
        ("shop.count=1", r"\[shop\] is not a section; known: store, compute, predictor, learner, log"),
        ("count=1", r"'count=1' is not of the form section\.key=value"),
        ("store.count", r"'store\.count' is not of the form section\.key=value"),
        ("store.=1", r"'store\.=1' is not of the form section\.key=value"),
    ],
)
def test_refuses_with_the_name_the_value_and_what_is_allowed(assignment: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sample(assignment)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"store\.name is missing"):
        Settings().section("store", Sample)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[store\n", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (b"[shop]\n", r"\[shop\] is not a section"),
        (b"store = 3\n", "store in .* is not a table"),
        (b"[store]\nname = 3\n", r"store\.name is 3; expected str"),
        (b"[store]\nname = ['x']\n", r"store\.name is \['x'\]; expected str"),
    ],
)
def test_a_bad_file_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "promoe.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        Settings(file).section("store", Sample)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no configuration file"):
        Settings(tmp_path / "missing.toml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        Settings(tmp_path)


def test_log_levels_are_checked_when_the_section_is_built() -> None:
    with pytest.raises(ValueError, match=r"log\.level is 'loud'; allowed: debug, info, warning, error"):
        Settings(None, ["log.level=loud"]).section("log", LogConfig)
    assert "log" in SECTIONS


def test_a_services_settings_are_checked_without_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["settings", *arguments])
        return check_settings("log", lambda file, assignments: Settings(file, assignments).section("log", LogConfig))

    assert (status("--set", "log.level=debug"), capsys.readouterr().err) == (0, "")
    assert status("--set", "log.level=loud") == 2
    assert capsys.readouterr().err == "log.level is 'loud'; allowed: debug, info, warning, error\n"
    assert status("--config", "/no/such.toml") == 2
    assert "There is no configuration file /no/such.toml." in capsys.readouterr().err
