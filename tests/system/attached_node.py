"""A compute node process without a model: attaches to a store, then answers commands line by line.

python -m tests.system.attached_node ENDPOINT NUM_LAYERS NUM_EXPERTS BLOB_NBYTES
> checksum        < xxh3-64 of all blobs one after the other, or the error's sentence
> state           < `attached` or `frozen`
> address         < address of L0E0's blob
> events          < how many blobs were published and retired so far
"""

import ctypes
import logging
import sys
from collections.abc import Callable

import xxhash

from compute_node.device.cpu import NoPinning
from compute_node.store_client import StoreClient
from promoe.errors import PromoeError
from promoe.ids import ExpertId
from tests.node_doubles import RecordingListener, ignore_progress


def say(text: object) -> None:
    """One line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Runs until standard input ends."""
    endpoint, num_layers, num_experts, blob_nbytes = sys.argv[1], *map(int, sys.argv[2:5])
    logging.basicConfig(level="INFO", stream=sys.stderr)
    listener = RecordingListener()
    client = StoreClient(endpoint, None, NoPinning(), listener)
    client.attach(60, ignore_progress)
    experts = [ExpertId(layer, expert) for layer in range(num_layers) for expert in range(num_experts)]

    def checksum() -> str:
        digest = xxhash.xxh3_64()
        for expert in experts:
            digest.update(ctypes.string_at(client.source_address(expert), blob_nbytes))
        return str(digest.hexdigest())

    commands: dict[str, Callable[[], str]] = {
        "checksum": checksum,
        "state": lambda: client.state.value,
        "address": lambda: str(client.source_address(experts[0])),
        "events": lambda: " ".join(
            str(sum(e[0] == kind for e in listener.events)) for kind in ("published", "retired")
        ),
    }
    say("attached")
    for line in sys.stdin:
        try:
            say(commands[line.strip()]())
        except PromoeError as error:
            say(error)
    client.close()


if __name__ == "__main__":
    main()
