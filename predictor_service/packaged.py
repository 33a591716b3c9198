"""The artifacts that come with promoe, found by the fingerprint of the pack they fit."""

from importlib.resources import files
from pathlib import Path

from predictor_service.artifact import SUFFIX, read_manifest


def packaged_artifact(fingerprint: str, kind: str) -> Path | None:
    """The artifact of this kind for the pack with this fingerprint, or None."""
    folder = Path(str(files("predictor_service"))) / "artifacts"
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        manifest = read_manifest(path)
        if manifest.kind == kind and fingerprint in manifest.fingerprints:
            return path
    return None
