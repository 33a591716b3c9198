"""A version in the registry is whole, checked, and never changes, whatever happens while it is published."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from predictor_service import registry as registry_module
from predictor_service.artifact import read_artifact, write_artifact
from predictor_service.registry import Registry, VersionName
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound, PromoeError, ResourceExhausted
from tests.predictor_service.full_disk import full_disk
from tests.predictor_service.layer_events import make_spec
from tests.predictor_service.test_artifact import MANIFEST, TENSORS

FITTING = replace(make_spec(), fingerprint=MANIFEST.fingerprints[0])


def written(folder: Path, version: str = "1", fill: float = 0.0) -> Path:
    """An artifact `a@version`."""
    path = folder / f"trained-{version}-{fill}.safetensors"
    tensors = {**TENSORS, "bias": np.full(2, fill, np.float32)}
    write_artifact(path, replace(MANIFEST, version=version), tensors)
    return path


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "deep" / "registry")


def names(registry: Registry) -> list[str]:
    return [str(entry.name) for entry in registry.entries()]


def files_in(registry: Registry) -> list[str]:
    return sorted(path.name for path in registry.folder.iterdir())


def test_what_is_published_is_found_and_whole(registry: Registry, tmp_path: Path) -> None:
    entry = registry.publish(written(tmp_path), FITTING)
    assert (str(entry.name), entry.fault) == ("a@1", "")
    assert registry.path_of(VersionName("a", "1")) == entry.path
    assert read_artifact(entry.path).manifest == MANIFEST
    assert entry.path.stat().st_mode & 0o777 == 0o640, "a service of the group reads it"
    assert files_in(registry) == ["a@1.safetensors"]


def test_publishing_twice_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    # The same file: safetensors does not write its metadata in the same order twice.
    source = written(tmp_path)
    first = registry.publish(source)
    assert registry.publish(source) == first
    assert names(registry) == ["a@1"]


def test_a_version_never_changes(registry: Registry, tmp_path: Path) -> None:
    entry = registry.publish(written(tmp_path, fill=0.0))
    before = entry.path.read_bytes()
    with pytest.raises(InvalidInput, match="a@1 is published already, with other contents"):
        registry.publish(written(tmp_path, fill=1.0))
    assert entry.path.read_bytes() == before
    assert files_in(registry) == ["a@1.safetensors"]


def test_of_two_at_once_one_is_published_and_the_other_is_told(registry: Registry, tmp_path: Path) -> None:
    sources = [written(tmp_path, fill=float(number)) for number in range(8)]

    def publish(source: Path) -> bool:
        try:
            registry.publish(source)
        except InvalidInput:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(publish, sources))
    assert outcomes.count(True) == 1
    assert registry.path_of(VersionName("a", "1")).read_bytes() == sources[outcomes.index(True)].read_bytes()
    assert files_in(registry) == ["a@1.safetensors"]


@pytest.mark.parametrize("place", [40, -1])
def test_a_damaged_artifact_is_not_published(registry: Registry, tmp_path: Path, place: int) -> None:
    source = written(tmp_path)
    content = bytearray(source.read_bytes())
    content[place] ^= 0x11
    source.write_bytes(content)
    with pytest.raises(PromoeError):
        registry.publish(source)
    assert files_in(registry) == []


def test_one_for_another_model_is_not_published(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match="was trained for fingerprint"):
        registry.publish(written(tmp_path), replace(FITTING, fingerprint="feedface"))
    assert files_in(registry) == []


def test_a_file_that_is_not_there_is_not_found(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing\.safetensors"):
        registry.publish(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["_flush", "_link"])
def test_a_full_disk_leaves_nothing_behind(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    if call == "_flush":
        monkeypatch.setattr(registry_module, call, fail)
    else:
        monkeypatch.setattr(Registry, call, fail)
    with pytest.raises(ResourceExhausted, match="nothing was changed"):
        registry.publish(written(tmp_path))
    assert files_in(registry) == []
    monkeypatch.undo()
    assert str(registry.publish(written(tmp_path)).name) == "a@1"


def test_a_disk_that_is_really_full_takes_no_part_of_a_version(registry: Registry, tmp_path: Path) -> None:
    source = written(tmp_path)
    with full_disk(registry.folder) as filling:
        with pytest.raises(ResourceExhausted, match=r"No space left on device.*nothing was changed"):
            registry.publish(source)
        assert files_in(registry) == [filling.name]
        filling.unlink()
        assert str(registry.publish(source).name) == "a@1"
        assert read_artifact(registry.path_of(VersionName("a", "1"))).manifest == MANIFEST


KILLED_PUBLISHER = """
import os, signal, sys
from pathlib import Path
from predictor_service import registry
def die(*arguments): os.kill(os.getpid(), signal.SIGKILL)
setattr(registry.Registry if sys.argv[3] == "_link" else registry, sys.argv[3], die)
registry.Registry(Path(sys.argv[1])).publish(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("call", ["_flush", "_link", "read_artifact"])
def test_a_killed_publisher_leaves_no_version_and_is_swept_up_after(
    registry: Registry, tmp_path: Path, call: str
) -> None:
    source = written(tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_PUBLISHER, str(registry.folder), str(source), call], timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert names(registry) == []
    assert len(files_in(registry)) == 1, "what it was writing is still there"
    registry.publish(source)
    assert files_in(registry) == ["a@1.safetensors"]


def test_what_somebody_is_publishing_is_not_swept_away(registry: Registry, tmp_path: Path) -> None:
    registry.folder.mkdir(parents=True)
    with registry._partial("b@1") as partial:
        registry.publish(written(tmp_path))
        assert partial.exists()
    assert files_in(registry) == ["a@1.safetensors"]


def test_the_oldest_go_first_and_none_that_is_in_use(registry: Registry, tmp_path: Path) -> None:
    for version in range(5):
        entry = registry.publish(written(tmp_path, str(version)))
        os.utime(entry.path, (1000 + version, 1000 + version))
    assert [str(name) for name in registry.prune("a", 2, frozenset({VersionName("a", "1")}))] == ["a@0", "a@2"]
    assert names(registry) == ["a@1", "a@3", "a@4"]
    assert registry.prune("b", 1, frozenset()) == []


def test_what_is_removed_is_gone_and_what_was_never_there_is_said(registry: Registry, tmp_path: Path) -> None:
    registry.publish(written(tmp_path))
    registry.remove(VersionName("a", "1"))
    assert names(registry) == []
    with pytest.raises(ModelNotFound, match=r"There is no version a@1 .* published: none"):
        registry.remove(VersionName("a", "1"))


def test_what_is_no_version_is_listed_with_its_fault_or_not_at_all(registry: Registry, tmp_path: Path) -> None:
    registry.publish(written(tmp_path))
    (registry.folder / "notes.txt").write_text("mine")
    (registry.folder / "no version@@.safetensors").write_text("mine")
    (registry.folder / "b@1.safetensors").write_bytes(b"cut")
    (registry.folder / "c@9.safetensors").write_bytes(registry.path_of(VersionName("a", "1")).read_bytes())
    faults = {str(entry.name): entry.fault for entry in registry.entries()}
    assert faults["a@1"] == ""
    assert "damaged" in faults["b@1"]
    assert "says that it is a@1" in faults["c@9"]
    assert set(faults) == {"a@1", "b@1", "c@9"}


@pytest.mark.parametrize("text", ["", "a", "@1", "a@", "a@1/..", "../a@1", "a b@1", "a@1\n", ".a@1"])
def test_a_name_that_could_leave_the_folder_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected NAME@VERSION"):
        VersionName.parse(text)
