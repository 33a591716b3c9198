"""Step 1: the World English Bible as plain chapters."""

import re
import subprocess
from pathlib import Path

from promoe.errors import ModelNotFound

CHAPTER_SEPARATOR = "\n\n\n"

_MODULE = "engWEB2015eb"  # the text module of Debian's sword-text-web
_VERSE = re.compile(r"^(?P<book>[1-3I]* ?[A-Za-z ]+) (?P<chapter>\d+):\d+: ?(?P<text>.*)$")


def write_corpus(path: Path) -> int:
    """Read the Bible with diatheke and write its chapters to `path`; returns how many there are.

    Raises ModelNotFound when diatheke or its text module is not installed.
    """
    command = ["diatheke", "-b", _MODULE, "-f", "plain", "-k", "Genesis-Revelation"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ModelNotFound("diatheke is not installed: install Debian's diatheke and sword-text-web") from error
    found = chapters(done.stdout)
    if not found:
        raise ModelNotFound(f"diatheke found no text in {_MODULE}: install Debian's sword-text-web")
    path.write_text(CHAPTER_SEPARATOR.join(found))
    return len(found)


def chapters(diatheke_output: str) -> list[str]:
    """Join diatheke's verses (`Genesis 1:1: In the ...`, long ones wrapped) to one line of prose per chapter."""
    texts: dict[tuple[str, str], list[str]] = {}
    lines: list[str] = []
    for line in diatheke_output.splitlines():
        verse = _VERSE.match(line)
        if verse:
            lines = texts.setdefault((verse["book"], verse["chapter"]), [])
            lines.append(verse["text"])
        elif not line.startswith(f"({_MODULE}"):  # diatheke signs its output with the module's name
            lines.append(line)
    return [re.sub(r"\s+", " ", " ".join(parts)).strip() for parts in texts.values()]
