"""A disk that is really full: a tiny tmpfs, where this user may mount one."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_PAGE_NBYTES = 4096


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """Mounts it over the folder; gives the file that fills it, whose removal makes room."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a file system can be mounted by root only ({mounted.stderr.strip()})")
    try:
        filling = folder / ".filling"
        with filling.open("wb", buffering=0) as file, suppress(OSError):  # it ends when there is no room left
            while file.write(bytes(_PAGE_NBYTES)):
                pass
        yield filling
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
