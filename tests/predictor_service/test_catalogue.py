"""What can be loaded: published versions first, what comes with promoe, and plug-ins by their names."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from predictor_service.admin.in_use import history_path, versions_in_use
from predictor_service.artifact import read_artifact, read_manifest, write_artifact
from predictor_service.catalogue import Catalogue
from predictor_service.registry import Registry, VersionName
from predictor_service.version_log import VersionLog, Wish
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from promoe.model_spec import ModelSpec
from promoe.predictor_versions import VersionAction, VersionOrigin, VersionState
from tests.predictor_service.layer_events import NO_PACK, make_spec
from tests.predictor_service.made_up_traces import learnable_spec
from tests.predictor_service.trained import train_small


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, source = train_small("learned", tmp_path_factory.mktemp("trained"))
    assert source.artifact is not None
    return source.artifact


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def republished(registry: Registry, artifact: Path, version: str, fingerprint: str | None = None) -> str:
    """The artifact under another version."""
    read = read_artifact(artifact)
    manifest = replace(read.manifest, version=version)
    if fingerprint is not None:
        manifest = replace(manifest, fingerprints=(fingerprint,))
    path = artifact.parent / "again.safetensors"
    write_artifact(path, manifest, read.tensors)
    return str(registry.publish(path).name)


def catalogue(registry: Registry | None, spec: ModelSpec | None = None) -> Catalogue:
    return Catalogue(spec or learnable_spec(), NO_PACK, registry)


def test_a_published_version_is_loaded_by_its_name(registry: Registry, artifact: Path) -> None:
    version = republished(registry, artifact, "7")
    listed = catalogue(registry).versions()
    assert listed[0].version == version
    assert (listed[0].origin, listed[0].state, listed[0].kind) == (
        VersionOrigin.REGISTRY,
        VersionState.AVAILABLE,
        "learned",
    )
    assert catalogue(registry).load(version).version.version == version


@pytest.mark.parametrize("name", ["frequency", "transition", "none"])
def test_plug_ins_without_training_are_there_without_a_registry(name: str) -> None:
    listed = {info.version: info for info in catalogue(None).versions()}
    assert listed[name].origin is VersionOrigin.PLUGIN
    made = catalogue(None).load(name)
    assert catalogue(None).load(made.version.version).version == made.version


def test_what_comes_with_promoe_is_found_by_name() -> None:
    folder = Path(str(files("predictor_service"))) / "artifacts"
    fingerprint = read_manifest(folder / "learned-demo.safetensors").fingerprints[0]
    listed = catalogue(None, replace(make_spec(), fingerprint=fingerprint)).versions()
    assert [info.kind for info in listed if info.origin is VersionOrigin.PACKAGED] == ["learned", "promoe"]


def test_a_version_for_another_model_is_listed_with_its_fault_and_not_loaded(
    registry: Registry, artifact: Path
) -> None:
    version = republished(registry, artifact, "8", fingerprint="feedface")
    (info,) = [info for info in catalogue(registry).versions() if info.version == version]
    assert info.state is VersionState.UNUSABLE
    assert "another model" in info.fault
    with pytest.raises(ModelMismatch):
        catalogue(registry).load(version)


def test_a_version_that_was_damaged_since_is_not_loaded(registry: Registry, artifact: Path) -> None:
    version = republished(registry, artifact, "9")
    path = registry.path_of(VersionName.parse(version))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="damaged"):
        catalogue(registry).load(version)


@pytest.mark.parametrize("version", ["nothing@1", "frequency@99", "nothing"])
def test_what_there_is_not_is_said_with_what_there_is(version: str) -> None:
    with pytest.raises(ModelNotFound, match=r"known: .*frequency"):
        catalogue(None).load(version)


def test_what_a_service_would_go_on_with_is_in_use(registry: Registry) -> None:
    wish = Wish("ann", "")
    for service, changes in (("s1", ("a@1", "a@2", "a@3")), ("s2", ("b@1",))):
        log = VersionLog(history_path(registry.folder, "0badcafe"), service)
        for before, after in zip(("", *changes), changes, strict=False):
            log.add(VersionAction.ACTIVATE, before, after, wish)
    assert {str(name) for name in versions_in_use(registry.folder)} == {"a@3", "a@2", "b@1"}
