"""`python -m expert_store.settings`: whether a store's settings can be, in a moment and without a pack."""

import sys
from pathlib import Path

from expert_store.config import StoreConfig
from promoe.config import LogConfig, Settings
from promoe.settings_check import check_settings


def check(config_file: Path | None, assignments: list[str]) -> None:
    """What the pack has no say in.

    Raises:
        ValueError: the sentence.
    """
    settings = Settings(config_file, assignments)
    settings.section("log", LogConfig)
    settings.section("store", StoreConfig)


if __name__ == "__main__":
    sys.exit(check_settings("store", check))
