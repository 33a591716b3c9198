"""Configuration: one TOML file, frozen dataclasses, unknown keys are errors.

The file has one table per service (`[store]`, `[compute]`, `[predictor]`), one for the predictor's learner
(`[learner]`), and shared ones (`[log]`). A service loads its own table and the shared ones; keys of other services'
tables are theirs to check.
"""

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from promoe.log_format import LogFormat

SECTIONS: Final = ("store", "compute", "predictor", "learner", "log")

_T = TypeVar("_T")


class SettingUnfit(ValueError):
    """A setting that can be read, but does not fit the model or the device; the text names it, value and allowed set.

    Told apart from other ValueErrors, which in a running service are bugs.
    """


@dataclass(frozen=True)
class LogConfig:
    """How a process logs to standard error.

    Attributes:
        level: `debug`, `info`, `warning` or `error`.
        format: `text` for people, or `json`: an object a line, with the id of the request it is about.
    """

    level: str = "info"
    format: LogFormat = LogFormat.TEXT

    def __post_init__(self) -> None:
        if self.level not in ("debug", "info", "warning", "error"):
            raise ValueError(f"log.level is {self.level!r}; allowed: debug, info, warning, error")


class Settings:
    """What the file and the command line ask for, not yet checked against any section's dataclass.

    Args:
        path: the TOML file, or None for defaults only.
        assignments: `section.key=value` texts; values are TOML, or plain text where TOML cannot read them.
    """

    def __init__(self, path: Path | None = None, assignments: typing.Sequence[str] = ()) -> None:
        self._tables: dict[str, dict[str, object]] = {}
        if path is not None:
            self._read(path)
        for assignment in assignments:
            self._assign(assignment)

    def section(self, name: str, config_type: type[_T]) -> _T:
        """Builds the section's frozen dataclass.

        Raises:
            ValueError: an unknown key (the known ones are listed), a missing one, or a value of the wrong type.
        """
        assert name in SECTIONS, f"{name} is not a section"
        assert dataclasses.is_dataclass(config_type), "a section is a dataclass"
        hints = typing.get_type_hints(config_type)
        fields = dataclasses.fields(config_type)
        known = {field.name for field in fields}
        values: dict[str, object] = {}
        for key, value in self._tables.get(name, {}).items():
            if key not in known:
                raise ValueError(f"{name}.{key} is not a setting; known in [{name}]: {', '.join(sorted(known))}")
            values[key] = _convert(f"{name}.{key}", value, hints[key])
        for field in fields:
            if field.name not in values and not _has_default(field):
                raise ValueError(f"{name}.{field.name} is missing; it has no default")
        return config_type(**values)

    def asked(self, section: str, key: str, value_type: type[_T]) -> _T | None:
        """One setting as it was asked for, or None; for a process that only passes another one's settings on.

        Raises:
            ValueError: a value of the wrong type.
        """
        value = self._tables.get(section, {}).get(key)
        return None if value is None else typing.cast("_T", _convert(f"{section}.{key}", value, value_type))

    def _read(self, path: Path) -> None:
        try:
            document = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"There is no configuration file {path}.") from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        for name, table in document.items():
            _check_section(name)
            if not isinstance(table, dict):
                raise ValueError(f"{name} in {path} is not a table")
            self._tables[name] = dict(table)

    def _assign(self, assignment: str) -> None:
        target, separator, text = assignment.partition("=")
        section, dot, key = target.strip().partition(".")
        if not separator or not dot or not key:
            raise ValueError(f"{assignment!r} is not of the form section.key=value")
        _check_section(section)
        self._tables.setdefault(section, {})[key] = _CommandLineText(text.strip())


class _CommandLineText(str):
    """A value of `--set`: TOML, or plain text where the setting wants text."""

    __slots__ = ()


def _has_default(field: "dataclasses.Field[object]") -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _check_section(name: str) -> None:
    if name not in SECTIONS:
        raise ValueError(f"[{name}] is not a section; known: {', '.join(SECTIONS)}")


def _parse_value(text: str, options: typing.Sequence[object]) -> object:
    """What the text means; `1` and `true` stay text for a setting that takes text only."""
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return str(text)
    value: object = document["value"]
    is_quoted = isinstance(value, str)
    wants_text_only = all(option in (str, Path, type(None)) for option in options)
    return str(text) if len(document) > 1 or (wants_text_only and not is_quoted) else value


def _convert(name: str, value: object, hint: object) -> object:
    """Checks `value` against the field's type; text becomes a Path or an Enum, an int a float, where asked."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, _CommandLineText):
        value = _parse_value(value, options)
    for option in options:
        if option is type(None):
            continue
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if option is Path and isinstance(value, str):
            return Path(value).expanduser()
        if isinstance(option, type) and issubclass(option, Enum):
            allowed = [member.value for member in option]
            if value in allowed:
                return option(value)
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}")
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options if option is not type(None))
    raise ValueError(f"{name} is {value!r}; expected {wanted}")
