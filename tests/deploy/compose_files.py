"""The compose files as data."""

from typing import Final, TypedDict, cast

import yaml

from tests.source_tree import ROOT

DEPLOY: Final = ROOT / "deploy"
OVERLAYS: Final = ("compose.gpu.yaml", "compose.observe.yaml", "compose.bluegreen.yaml", "compose.ci.yaml")
COMPOSE_FILES: Final = ("compose.yaml", *OVERLAYS)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Knows compose's own tag, which takes a value away."""


class Healthcheck(TypedDict, total=False):
    test: list[str]


class ComposeService(TypedDict, total=False):
    """What tests look at."""

    build: dict[str, str]
    cap_drop: list[str]
    command: list[str]
    healthcheck: Healthcheck
    init: bool
    mem_limit: str
    memswap_limit: str
    ports: list[str]
    read_only: bool
    restart: str
    security_opt: list[str]
    stop_grace_period: str
    volumes: list[str]


class ComposeFile(TypedDict):
    services: dict[str, ComposeService]


def load_compose(file: str) -> ComposeFile:
    """One file, with its variables as they are written."""
    _Loader.add_constructor("!reset", lambda _loader, _node: None)
    return cast("ComposeFile", yaml.load((DEPLOY / file).read_text(), _Loader))
