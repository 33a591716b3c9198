"""Fixtures of the system tests."""

from pathlib import Path

import pytest

from tests.system.tiny_stack import pack_tiny_model


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack of a tiny random Mixtral; tests that damage it copy it first."""
    return pack_tiny_model(tmp_path_factory.mktemp("tiny"))
