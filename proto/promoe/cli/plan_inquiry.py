"""Asks the services' own modules what a model takes and what a node would decide; each answers with a JSON document."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promoe.cli.pack_cache import DEMO_MODEL, PackPlan
from promoe.cli.supervisor import launch_arguments
from promoe.errors import InternalError, PromoeError
from promoe.footprint import HostRoom, ModelFootprint

_FOOTPRINT_MODULE: Final = "expert_store.pack"
_PLANNING_MODULE: Final = "compute_node.planning"
_WRONG_USAGE: Final = 2


@dataclass(frozen=True)
class StoreAnswer:
    """What the expert store says: the model's footprint, and how much memory it may take on this machine."""

    footprint: ModelFootprint
    room: HostRoom


def ask_store(pack: PackPlan, dtype: str | None) -> StoreAnswer:
    """The footprint of a pack that is there, or of what would be packed.

    Raises:
        PromoeError: the model cannot be had, or cannot be served.
    """
    arguments = (footprint_source(pack), "--footprint", *(("--dtype", dtype) if dtype else ()))
    document = _answer(_FOOTPRINT_MODULE, arguments)
    return StoreAnswer(ModelFootprint.of_document(document["model"]), HostRoom.of_document(document["host"]))


def ask_node(footprint: ModelFootprint, arguments: Sequence[str]) -> dict[str, object]:
    """The node's plan, as `compute_node.planning` writes it.

    Raises:
        ValueError: a setting is wrong, or does not fit the model.
        PromoeError: it cannot be planned.
    """
    return _answer(_PLANNING_MODULE, tuple(arguments), json.dumps(footprint.as_document()))


def footprint_source(pack: PackPlan) -> str:
    """What the store is to look at: the pack, else what it would be made of, else the demo model's own config."""
    if not pack.steps:
        return str(pack.pack_dir)
    source = pack.steps[-1].arguments[0]
    is_built = pack.model != DEMO_MODEL or (Path(source) / "config.json").is_file()
    return source if is_built else DEMO_MODEL


def _answer(module: str, arguments: tuple[str, ...], document: str = "") -> dict[str, object]:
    done = subprocess.run(
        launch_arguments(module, arguments), input=document, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return _table(json.loads(done.stdout))
    sentence = done.stderr.strip().rpartition("error: ")[2] or f"{module} ended with status {done.returncode}."
    if done.returncode == _WRONG_USAGE:
        raise ValueError(sentence)
    if "Traceback" in done.stderr:
        raise InternalError(f"{module} failed:\n{done.stderr.strip()}")
    raise PromoeError(sentence)


def _table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InternalError(f"Expected a JSON object instead of {value!r}.")
    return value
