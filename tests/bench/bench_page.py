"""What a page that is open costs the answers: TPOT without and with listeners of `/api/live`, in turns.

One node of the demo model, one stream at a time; the rounds with and without listeners take turns within seconds. A
listener is a client that reads the live stream, as the page does; what a browser does with it is its own machine's
work. Beside it, what the node says of its looks: how long each held the event loop, whatever else it waited for.
Goal: less than 1 % of TPOT with one page.
"""

import argparse
import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import httpx2

from compute_node.http.live_feed import INTERVAL_S
from promoe import Client
from tests.bench.demo_model import PROMPTS, chat, demo_pack
from tests.bench.report import Sample, median_ratio, out_argument, write_report
from tests.running_node import RunningNode
from tests.running_store import RunningStore

GOAL: Final = 1.01
_READ_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True)
class Look:
    """One event of the stream: its size, and how long the look before it held the event loop."""

    nbytes: int
    look_s: float


@contextmanager
def listener(url: str) -> Iterator[list[Look]]:
    """Reads the live stream in a thread; gives its looks."""
    looks: list[Look] = []
    leaving = threading.Event()

    def read() -> None:
        with httpx2.stream("GET", f"{url}/api/live", timeout=_READ_TIMEOUT_S) as response:
            for line in response.iter_lines():
                if line:
                    looks.append(Look(len(line), float(json.loads(line.removeprefix("data: "))["look_s"])))
                if leaving.is_set():
                    return

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield looks
    finally:
        leaving.set()
        thread.join()


def tpot_s(client: Client, prompt: str, num_tokens: int) -> float:
    """Of one greedy answer, as its client sees it."""
    with client.generate(chat(prompt), max_tokens=num_tokens, ignore_eos=True) as stream:
        arrivals = [perf_counter() for delta in stream.deltas() for _ in delta.token_ids]
    return (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


def measure(rounds: int, num_tokens: int, num_pages: int) -> dict[str, object]:
    """Neighbours of each round ask the same; who goes first changes from round to round."""
    pack_dir = demo_pack()
    quiet: list[float] = []
    watched: list[float] = []
    looks: list[Look] = []
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        RunningStore(pack_dir, Path(folder)) as store,
        RunningNode(
            pack_dir, store.endpoint, Path(folder), "compute.cache_rate=0.5", "compute.http_listen=127.0.0.1:0"
        ) as node,
        node.client() as client,
    ):
        url = node.http_url()
        tpot_s(client, PROMPTS[0], num_tokens)
        for number in range(rounds):
            prompt = PROMPTS[number % len(PROMPTS)]
            for is_watched in (number % 2 == 0, number % 2 == 1):
                with ExitStack() as pages:
                    heard = [pages.enter_context(listener(url)) for _ in range(num_pages if is_watched else 0)]
                    (watched if is_watched else quiet).append(tpot_s(client, prompt, num_tokens))
                looks += [look for page in heard for look in page[1:]]
    look_s = Sample(tuple(look.look_s for look in looks)).median
    return {
        "num_pages": num_pages,
        "num_tokens": num_tokens,
        "tpot_s": {"quiet": Sample(tuple(quiet)).as_dict(), "watched": Sample(tuple(watched)).as_dict()},
        "ratio": median_ratio(watched, quiet),
        "goal": GOAL,
        "look_nbytes": Sample(tuple(look.nbytes for look in looks)).median,
        "look_s": look_s,
        "share_of_the_event_loop": look_s / INTERVAL_S,
    }


def main() -> None:
    """Prints the ratio and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--pages", type=int, default=1)
    out_argument(parser)
    options = parser.parse_args()
    measured = measure(options.rounds, options.tokens, options.pages)
    print(f"TPOT with {options.pages} page(s): {measured['ratio']:.4f} times that without (goal {GOAL}).")
    print(
        f"A look holds the event loop for {1e3 * float(str(measured['look_s'])):.2f} ms, "
        f"{100 * float(str(measured['share_of_the_event_loop'])):.2f} % of its time."
    )
    print(f"Written: {write_report('page', measured, options.out)}")


if __name__ == "__main__":
    main()
