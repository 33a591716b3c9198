"""The project's own plug-ins are the installed ones, each loads, and each says what it is."""

import tomllib
from typing import Final

import pytest

from predictor_service.plugins import installed_predictors, make_predictor
from predictor_service.predictor import ENTRY_POINT_GROUP
from tests.predictor_service.layer_events import make_spec, source_of
from tests.source_tree import ROOT

DECLARED: Final[dict[str, str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    ENTRY_POINT_GROUP
]


def test_what_is_declared_is_installed() -> None:
    installed = {name: point.value for name, point in installed_predictors().items()}
    assert DECLARED.items() <= installed.items(), "install the project again: its metadata is older than its code"


@pytest.mark.parametrize("name", sorted(DECLARED))
def test_each_of_them_is_a_factory(name: str) -> None:
    assert callable(installed_predictors()[name].load())


@pytest.mark.parametrize("name", ["frequency", "none", "transition"])
def test_a_version_is_named_after_its_plugin(name: str) -> None:
    version = make_predictor(name, source_of(make_spec(layers=9))).version
    assert version.predictor == name
    assert version.version.partition("@")[0] == name
    assert version.calibrated
