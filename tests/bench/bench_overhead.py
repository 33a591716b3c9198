"""What promoe costs when it has nothing to do: cache rate 1.0 against plain Transformers continuous batching.

Both sides serve the same chats with the same number of threads, taking turns. The plain side is Transformers' own
manager on the whole model with its default experts implementation, called directly in this process; promoe's side is
the served path with its own processes: client (here), gRPC, compute node, expert cache, store.
Goal: TPOT and TTFT at most 1.15 times the plain side.
"""

import argparse
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from compute_node.batch_loop import KV_BLOCK_TOKENS
from promoe import Client
from tests.bench.demo_model import PROMPTS, chat, demo_checkpoint, demo_pack
from tests.bench.report import Sample, median_ratio, out_argument, write_report
from tests.running_node import RunningNode
from tests.running_store import RunningStore

GOAL: Final = 1.15
CONTEXT_TOKENS: Final = 2048
MAX_BATCH_TOKENS: Final = 512
"""The compute node's default."""


@dataclass(frozen=True)
class RoundTimes:
    """One batch of requests: medians over its requests, in seconds."""

    ttft_s: float
    tpot_s: float


class PlainSide:
    """Transformers' continuous batching, as a Transformers user would run it."""

    def __init__(self, manager: ContinuousBatchingManager, prompts: list[list[int]]) -> None:
        self._manager = manager
        self._prompts = prompts
        self._number = 0

    def run(self, batch: int, num_tokens: int) -> RoundTimes:
        """Adds the requests at once and follows all of them."""
        ids = []
        started_s = perf_counter()
        for prompt in self._prompts[:batch]:
            self._number += 1
            ids.append(f"plain-{self._number}")
            self._manager.add_request(
                prompt, request_id=ids[-1], max_new_tokens=num_tokens, streaming=True, eos_token_id=-1
            )
        arrivals: dict[str, list[float]] = {request_id: [] for request_id in ids}
        while any(len(times) < num_tokens for times in arrivals.values()):
            output = self._manager.get_result(timeout=60)
            assert output is not None, "plain Transformers answers"
            assert output.error is None, output.error
            arrivals[output.request_id].append(perf_counter())
        return _round_times(started_s, list(arrivals.values()))


class PromoeSide:
    """The served path."""

    def __init__(self, endpoint: str) -> None:
        self._clients = [Client(endpoint) for _ in PROMPTS]

    def run(self, batch: int, num_tokens: int) -> RoundTimes:
        """One thread per client; the token's arrival is when the client has it."""
        arrivals: list[list[float]] = [[] for _ in range(batch)]

        def ask(index: int) -> None:
            with self._clients[index].generate(chat(PROMPTS[index]), max_tokens=num_tokens, ignore_eos=True) as stream:
                arrivals[index].extend(perf_counter() for delta in stream.deltas() for _ in delta.token_ids)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(batch)]
        started_s = perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return _round_times(started_s, arrivals)


def _round_times(started_s: float, arrivals: list[list[float]]) -> RoundTimes:
    ttft = Sample(tuple(times[0] - started_s for times in arrivals))
    tpot = Sample(tuple((times[-1] - times[0]) / (len(times) - 1) for times in arrivals))
    return RoundTimes(ttft.median, tpot.median)


@contextmanager
def plain_side(checkpoint: Path, max_batch_tokens: int) -> Iterator[PlainSide]:
    """The whole model in memory; the same KV blocks, batch limits and attention as the other side."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(chat(text), tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for text in PROMPTS
    ]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    config = ContinuousBatchingConfig(
        num_blocks=len(PROMPTS) * CONTEXT_TOKENS // KV_BLOCK_TOKENS,
        max_batch_tokens=max_batch_tokens,
        max_requests_per_batch=len(PROMPTS),
        use_async_batching=False,
        use_cuda_graph=False,
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(  # type: ignore[operator]
        generation_config=generation, continuous_batching_config=config
    )
    manager.start()
    try:
        yield PlainSide(manager, prompts)
    finally:
        manager.stop(block=True, hard_stop=True)


def measure(rounds: int, num_tokens: int, num_threads: int) -> dict[str, object]:
    """Interleaved rounds at batch 1 and 8; one unmeasured round warms each side up."""
    torch.set_num_threads(num_threads)
    pack_dir = demo_pack()
    results: dict[str, object] = {}
    with (
        tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder,
        RunningStore(pack_dir, Path(folder)) as store,
    ):
        settings = (
            "compute.cache_rate=1.0",
            f"compute.max_context_tokens={CONTEXT_TOKENS}",
            f"compute.num_threads={num_threads}",
        )
        with (
            plain_side(demo_checkpoint(), MAX_BATCH_TOKENS) as plain,
            RunningNode(pack_dir, store.endpoint, Path(folder), *settings) as node,
        ):
            promoe = PromoeSide(node.endpoint())
            for batch in (1, len(PROMPTS)):
                plain.run(batch, 4)
                promoe.run(batch, 4)
                pairs = [(plain.run(batch, num_tokens), promoe.run(batch, num_tokens)) for _ in range(rounds)]
                results[f"batch_{batch}"] = _compare(pairs)
    return results


def _compare(pairs: list[tuple[RoundTimes, RoundTimes]]) -> dict[str, object]:
    compared: dict[str, object] = {}
    for name in ("tpot_s", "ttft_s"):
        plain = [float(getattr(pair[0], name)) for pair in pairs]
        promoe = [float(getattr(pair[1], name)) for pair in pairs]
        ratio = median_ratio(promoe, plain)
        compared[name] = {
            "plain": Sample(tuple(plain)).as_dict(),
            "promoe": Sample(tuple(promoe)).as_dict(),
            "ratio": ratio,
            "goal": GOAL,
            "met": ratio <= GOAL,
        }
        print(
            f"  {name[:4].upper()}: plain {Sample(tuple(plain)).median * 1e3:7.1f} ms, "
            f"promoe {Sample(tuple(promoe)).median * 1e3:7.1f} ms, ratio {ratio:.3f} (goal {GOAL})"
        )
    return compared


def main() -> None:
    """Prints the ratios and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    out_argument(parser)
    options = parser.parse_args()
    measured = measure(options.rounds, options.tokens, options.threads)
    print(f"Written: {write_report('overhead', measured, options.out)}")


if __name__ == "__main__":
    main()
