"""Every version that could be active: published ones, those that come with promoe, and plug-ins without training."""

from dataclasses import replace
from pathlib import Path

from predictor_service.artifact import ArtifactManifest
from predictor_service.packaged import packaged_artifacts
from predictor_service.plugins import installed_predictors, make_predictor
from predictor_service.predictor import Predictor, PredictorSource
from predictor_service.registry import Registry, RegistryEntry, VersionName
from promoe.errors import ModelNotFound
from promoe.model_spec import ModelSpec
from promoe.predictor_versions import VersionInfo, VersionMetric, VersionOrigin, VersionState


class Catalogue:
    """What one service can load.

    Args:
        spec: the model whose experts are predicted.
        pack: its folder.
        registry: of published versions; None for none.
    """

    def __init__(self, spec: ModelSpec, pack: Path, registry: Registry | None) -> None:
        self._registry = registry
        self._spec = spec
        self._pack = pack

    def versions(self) -> list[VersionInfo]:
        """All of them, published ones first; none is said to be active."""
        published = [] if self._registry is None else self._registry.entries()
        known = [self._published(entry) for entry in published]
        for path, manifest in packaged_artifacts(self._spec.fingerprint):
            known.append(_info(manifest, VersionOrigin.PACKAGED, path.stat().st_size))
        trained = {version.kind for version in known}
        plugins = [name for name in installed_predictors() if name not in trained]
        return known + [VersionInfo(name, name, VersionOrigin.PLUGIN) for name in plugins]

    def load(self, version: str) -> Predictor:
        """Makes a predictor of a version, or of a plug-in that needs no training.

        Raises:
            ModelNotFound: there is none; the text lists those there are.
            InvalidInput, ModelMismatch, ModelUnsupported: it is damaged, or not for this model.
            SettingUnfit: its plug-in is not installed.
        """
        if "@" in version:
            artifact = self._artifact_of(VersionName.parse(version))
            if artifact is not None:
                path, kind = artifact
                return make_predictor(kind, PredictorSource(self._spec, self._pack, path))
        plugin = version.partition("@")[0]
        if plugin in installed_predictors():
            made = make_predictor(plugin, PredictorSource(self._spec, self._pack))
            if version in (plugin, made.version.version):
                return made
        known = ", ".join(info.version for info in self.versions())
        raise ModelNotFound(f"There is no version {version} of a predictor here; known: {known}.")

    def artifact_path(self, version: str) -> Path | None:
        """The file of a version; None for a plug-in's, and for what is known from elsewhere."""
        found = self._artifact_of(VersionName.parse(version)) if "@" in version else None
        return None if found is None else found[0]

    def _artifact_of(self, name: VersionName) -> tuple[Path, str] | None:
        """The file of that name and its kind; a published one goes before one that comes with promoe."""
        if self._registry is not None:
            for entry in self._registry.entries():
                if entry.name == name and entry.manifest is not None:
                    return entry.path, entry.manifest.kind
        for path, manifest in packaged_artifacts(self._spec.fingerprint):
            if (manifest.name, manifest.version) == name:
                return path, manifest.kind
        return None

    def _published(self, entry: RegistryEntry) -> VersionInfo:
        fault = entry.fault
        if entry.manifest is None:
            info = VersionInfo(str(entry.name), origin=VersionOrigin.REGISTRY, size_bytes=entry.nbytes)
        else:
            info = _info(entry.manifest, VersionOrigin.REGISTRY, entry.nbytes)
            if not fault and self._spec.fingerprint not in entry.manifest.fingerprints:
                fault = f"It was trained for another model than {self._spec.name}."
        state = VersionState.UNUSABLE if fault else VersionState.AVAILABLE
        # Its file's name is what it is asked for by, whatever it says of itself.
        return replace(info, version=str(entry.name), state=state, fault=fault, published_unix_s=entry.published_unix_s)


def _info(manifest: ArtifactManifest, origin: VersionOrigin, nbytes: int) -> VersionInfo:
    return VersionInfo(
        version=f"{manifest.name}@{manifest.version}",
        kind=manifest.kind,
        origin=origin,
        size_bytes=nbytes,
        parent=manifest.parent,
        metrics=tuple(VersionMetric(name, float(value)) for name, value in manifest.metrics.items()),
    )
