"""Whether the modules that decide on the engine thread are compiled, and from the sources that lie beside them.

`setup.py` compiles those of `compiled_modules.txt`; Python then prefers the extension to the source of the same name.
"""

import hashlib
from enum import Enum
from pathlib import Path

from compute_node import slots
from promoe import errors
from promoe.errors import PromoeError


class Execution(Enum):
    """How the placement's code runs; what it decides is the same."""

    COMPILED = "compiled"
    INTERPRETED = "interpreted"


def execution() -> Execution:
    """How it runs here.

    Raises:
        PromoeError: a source was changed after it was compiled.
    """
    if Path(slots.__file__).suffix == ".py":
        return Execution.INTERPRETED
    # Not the extensions' own folders: one that another one has imported says a wrong place.
    node, contract = Path(__file__).parent, Path(errors.__file__).parent
    folders = {"compute_node": node, "promoe": contract}
    digest = hashlib.sha256()
    for line in (node / "compiled_modules.txt").read_text().split():
        source = Path(line)
        digest.update((folders[source.parent.name] / source.name).read_bytes())
    if (node / "compiled.digest").read_text().strip() != digest.hexdigest():
        raise PromoeError(
            "The compiled modules are older than their sources, and would be run in their place: run `make setup`."
        )
    return Execution.COMPILED
