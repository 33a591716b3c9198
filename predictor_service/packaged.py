"""The artifacts that come with promoe, found by the fingerprint of the pack they fit."""

from importlib.resources import files
from pathlib import Path

from predictor_service.artifact import SUFFIX, ArtifactManifest, read_manifest


def packaged_artifacts(fingerprint: str) -> list[tuple[Path, ArtifactManifest]]:
    """All that fit the pack with this fingerprint."""
    folder = Path(str(files("predictor_service"))) / "artifacts"
    found = [(path, read_manifest(path)) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    return [(path, manifest) for path, manifest in found if fingerprint in manifest.fingerprints]


def packaged_artifact(fingerprint: str, kind: str) -> Path | None:
    """The artifact of this kind for the pack with this fingerprint, or None."""
    return next((path for path, manifest in packaged_artifacts(fingerprint) if manifest.kind == kind), None)
