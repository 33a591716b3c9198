"""Builds the package; with PROMOE_COMPILE=1 the modules of compute_node/compiled_modules.txt as extensions (mypyc).

They are what runs on the engine thread for every layer and every load. The same sources run interpreted where nothing
was compiled: the decisions are the same, and take several times as long.
"""

import hashlib
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GROUP = "compute_node.compiled"


class BuildCompiled(build_ext):
    """Leaves a digest of the sources beside what was made from them: see `compute_node.compilation`."""

    def run(self) -> None:
        """See the command of setuptools."""
        super().run()
        if self.extensions:
            folder = Path(self.get_ext_fullpath(f"{GROUP}__mypyc")).parent
            (folder / "compiled.digest").write_text(_digest() + "\n")


def _sources() -> list[str]:
    return (ROOT / "compute_node/compiled_modules.txt").read_text().split()


def _digest() -> str:
    digest = hashlib.sha256()
    for source in _sources():
        digest.update((ROOT / source).read_bytes())
    return digest.hexdigest()


def _extensions() -> list[Extension]:
    if os.environ.get("PROMOE_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # asked for by those who compile only

    os.chdir(ROOT)
    extensions = list(mypycify(_sources(), opt_level="2", debug_level="0", group_name=GROUP))
    for extension in extensions:
        # A product and a sum rounded as one would be another number than interpreted, and decide otherwise.
        extension.extra_compile_args.append("-ffp-contract=off")
    return extensions


setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildCompiled})
