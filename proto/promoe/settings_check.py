"""What `python -m SERVICE.settings` does: looks at a service's command line, and starts nothing."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from promoe.errors import EXIT_WRONG_SETTING


def check_settings(section: str, check: Callable[[Path | None, list[str]], object]) -> int:
    """Of one service.

    Args:
        section: the service's.
        check: reads the sections of this file with these assignments; raises ValueError for what does not fit.

    Returns:
        The exit status: 0, or EXIT_WRONG_SETTING when standard error has the sentence.
    """
    parser = argparse.ArgumentParser(description=f"Checks the [{section}] settings, and starts nothing.")
    parser.add_argument("--config", type=Path, help=f"TOML file with a [{section}] table")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="overrides the file")
    options = parser.parse_args()
    try:
        check(options.config, options.set)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTING
    return 0
