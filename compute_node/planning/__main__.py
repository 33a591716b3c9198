"""`python -m compute_node.planning < FOOTPRINT`: what a node would decide for a model before it loads anything of it.

The plan (JSON) on stdout, errors on stderr; exit status 0 whether it fits or not, 1 after an error, 2 for a wrong
command line or a setting that does not fit.
"""

import json
import sys
from collections.abc import Sequence

import typer

from compute_node.compilation import execution
from compute_node.config import ComputeConfig
from compute_node.planning.node_plan import NodePlanner
from compute_node.planning.options import parse_options
from compute_node.planning.planned_device import PlannedDevice
from promoe.config import Settings
from promoe.errors import PromoeError
from promoe.footprint import ModelFootprint


def main(arguments: Sequence[str], document: str) -> int:
    """The exit status."""
    options = parse_options(arguments)
    try:
        execution()
        footprint = ModelFootprint.of_document(json.loads(document))
        config = Settings(options.config, options.assignments).section("compute", ComputeConfig)
        device = PlannedDevice.of(config, footprint, options.device)
        typer.echo(json.dumps(NodePlanner(config, footprint, options, device).as_document()))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except PromoeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.read()))
