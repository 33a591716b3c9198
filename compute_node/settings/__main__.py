"""`python -m compute_node.settings`: whether a node's settings can be, in a moment and without a model."""

import sys
from pathlib import Path

from compute_node.config import ComputeConfig
from compute_node.http.api_keys import keys_for
from compute_node.request_spans import check_spans
from promoe.config import LogConfig, Settings
from promoe.settings_check import check_settings


def check(config_file: Path | None, assignments: list[str]) -> None:
    """What neither the model nor the device has a say in.

    Raises:
        ValueError: the sentence.
    """
    settings = Settings(config_file, assignments)
    settings.section("log", LogConfig)
    config = settings.section("compute", ComputeConfig)
    config.schedule()
    check_spans(config.otlp_endpoint)
    if config.http_listen:
        keys_for(config)


if __name__ == "__main__":
    sys.exit(check_settings("compute", check))
