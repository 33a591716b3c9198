"""What the predictor's own process costs: TPOT with the service against the same predictor called in this process.

Both sides have an expert path of the same policy, cache rate and emulated link, and take turns on the same greedy
chats over one loaded model. In process the plug-in is called on a thread of its own, and its hints go into the same
kind of inbox. Goal: TPOT at most 1.03 times the in-process side.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import torch

from compute_node.schedule import POLICIES
from predictor_service.choice import choose_predictor
from predictor_service.predictor import PredictorSource
from tests.bench.demo_model import PROMPTS, demo_pack
from tests.bench.hint_sources import called_in_process, served_by
from tests.bench.report import Sample, median_ratio, out_argument, write_report
from tests.bench.side_by_side import ChatFigures, SidePath, shared_model, side_path
from tests.running_predictor import RunningPredictor

GOAL: Final = 1.03
POLICY: Final = POLICIES["proactive"]
ALL_MISS_SHARE: Final = 2.0
WARM_UP_TOKENS: Final = 16
SERVED: Final = "own process"
IN_PROCESS: Final = "in process"


def take_turns(sides: dict[str, SidePath], rounds: int, num_tokens: int) -> dict[str, list[ChatFigures]]:
    """Neighbours in time differ in the side only; the sides change places each round. Answers must be the same."""
    figures: dict[str, list[ChatFigures]] = {name: [] for name in sides}
    for side in sides.values():
        side.ask(PROMPTS[-1], WARM_UP_TOKENS)
        side.scores.restart()
    for number in range(rounds):
        prompt = PROMPTS[number % len(PROMPTS)]
        names = list(sides) if number % 2 else list(sides)[::-1]
        answers = {name: sides[name].ask(prompt, num_tokens) for name in names}
        assert len({answer.run.token_ids for answer in answers.values()}) == 1, f"{prompt!r} is answered in two ways"
        for name, answer in answers.items():
            figures[name].append(answer)
    return figures


def summarize(figures: dict[str, list[ChatFigures]], good_preds: dict[str, float | None]) -> dict[str, object]:
    """Medians of each side, and of their ratio in neighbouring chats."""
    tpots = {name: [chat.run.tpot_s for chat in chats] for name, chats in figures.items()}
    ratio = median_ratio(tpots[SERVED], tpots[IN_PROCESS])
    return {
        "ratio": ratio,
        "goal": GOAL,
        "met": ratio <= GOAL,
        "sides": {
            name: {
                "tpot_s": Sample(tuple(tpots[name])).as_dict(),
                "decode_hit_rate": _hit_rate(chats),
                "good_pred": good_preds[name],
            }
            for name, chats in figures.items()
        },
    }


def _hit_rate(chats: Sequence[ChatFigures]) -> float:
    hits = sum(chat.decode.hits for chat in chats)
    return hits / max(1, hits + sum(chat.decode.misses for chat in chats))


def measure(predictor_name: str, cache_rate: float, rounds: int, num_tokens: int) -> dict[str, object]:
    """One policy, cache rate and link."""
    pack_dir = demo_pack()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp")))
        running = RunningPredictor(pack_dir, folder, f"predictor.predictor={predictor_name}")
        endpoint = stack.enter_context(running).endpoint
        model = stack.enter_context(shared_model(pack_dir))
        resident = stack.enter_context(side_path(model, POLICIES["lru"], model.spec.num_experts, None, None))
        for _ in range(2):
            tpot_s = resident.ask(PROMPTS[-1], WARM_UP_TOKENS).run.tpot_s
        link_bytes_per_s = model.all_miss_nbytes / (ALL_MISS_SHARE * tpot_s)
        predictor = choose_predictor(predictor_name, PredictorSource(model.spec, pack_dir))
        slots = round(cache_rate * model.spec.num_experts)
        sides = {
            name: stack.enter_context(side_path(model, POLICY, slots, link_bytes_per_s, source))
            for name, source in ((SERVED, served_by(endpoint)), (IN_PROCESS, called_in_process(predictor)))
        }
        figures = take_turns(sides, rounds, num_tokens)
        measured = summarize(figures, {name: side.good_pred() for name, side in sides.items()})
    return {
        "predictor": predictor.version.version,
        "cache_rate": cache_rate,
        "link_bytes_per_s": link_bytes_per_s,
        "rounds": rounds,
        "num_tokens": num_tokens,
        **measured,
    }


def print_summary(measured: dict[str, object]) -> None:
    """For people."""
    sides = measured["sides"]
    assert isinstance(sides, dict), "both sides"
    for name, side in sides.items():
        good_pred = "–" if side["good_pred"] is None else f"{side['good_pred']:.3f}"
        print(
            f"  {name:<12} TPOT {side['tpot_s']['median'] * 1e3:6.1f} ms, decode hit rate "
            f"{side['decode_hit_rate']:.3f}, GoodPred {good_pred}"
        )
    print(f"  ratio {measured['ratio']:.3f} (goal {GOAL})")


def main() -> None:
    """Prints the ratio and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictor", default="auto", help="a plug-in's name, or auto")
    parser.add_argument("--rate", type=float, default=0.5, help="cache rate")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    out_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = measure(options.predictor, options.rate, options.rounds, options.tokens)
    print_summary(measured)
    print(f"Written: {write_report('split', {'num_threads': options.threads, **measured}, options.out)}")


if __name__ == "__main__":
    main()
