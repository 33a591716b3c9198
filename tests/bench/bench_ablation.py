"""What each part of proactive caching is worth: from reactive LRU to ProMoE to ours, over the cache rate.

Every row has all parts of the rows above it. All rows of one cache rate take turns on the same greedy chats in one
process, over one loaded model; predictors are services in their own processes. The link is emulated: loading every
expert of a token takes 2 (or 6) times as long as computing it all resident, measured first. Beside the rows: all
resident, the offline optimum's hits (Belady, slots shared by all layers) and the floor, max(compute all resident,
the optimum's bytes / link rate). Every row must give the same tokens; the run fails otherwise.
"""

import argparse
import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import torch

from compute_node.replay.belady import Visit
from compute_node.schedule import POLICIES
from tests.bench.ablation_plot import plot_ablation
from tests.bench.ablation_table import AblationGroup, Limits, Measured, make_group, print_group
from tests.bench.ablation_variants import OUR_PREDICTOR, PROMOE_PREDICTOR, variants
from tests.bench.decode_loop import recorded_routing
from tests.bench.demo_model import PROMPTS, demo_pack
from tests.bench.hint_sources import served_by
from tests.bench.optimum import optimum_of
from tests.bench.report import RESULTS, Sample, out_argument, write_report
from tests.bench.side_by_side import ChatFigures, SharedModel, SidePath, shared_model, side_path
from tests.running_predictor import RunningPredictor

CACHE_RATES: Final = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
FURTHER_CACHE_RATES: Final = (0.25, 0.5, 0.75)
"""At the links after the first."""

WARM_UP: Final = PROMPTS[-1]
WARM_UP_TOKENS: Final = 12
ALL_RESIDENT: Final = "all resident"


@dataclass(frozen=True)
class Effort:
    """What is measured at one link.

    Attributes:
        link_share: all-miss copy time divided by all-resident compute time.
        cache_rates: in this order.
        rounds, num_tokens: chats of each variant, and tokens of a chat.
    """

    link_share: float
    cache_rates: tuple[float, ...]
    rounds: int
    num_tokens: int


@dataclass(frozen=True)
class Reference:
    """The same chats all resident, unmeasured rounds included: what everybody must answer, and how it is routed.

    Attributes:
        tokens: by prompt.
        routing: by layer, the visits of the warm-up and of every round, in order.
        tpot_s: seconds per token, the median.
    """

    tokens: dict[str, tuple[int, ...]]
    routing: list[list[Visit]]
    tpot_s: float

    def check(self, name: str, prompt: str, figures: ChatFigures) -> None:
        """Raises AssertionError when another token was given."""
        given = figures.run.token_ids
        assert given == self.tokens[prompt][: len(given)], f"{name} answers {prompt!r} otherwise"


def prompts_of(rounds: int) -> list[str]:
    """Of the rounds, in order."""
    return [PROMPTS[number % (len(PROMPTS) - 1)] for number in range(rounds)]


def make_reference(model: SharedModel, resident: SidePath, effort: Effort) -> Reference:
    """Answers the warm-up and every round's chat once."""
    tokens: dict[str, tuple[int, ...]] = {}
    tpots: list[float] = []
    with recorded_routing(model.loaded.experts_modules) as routing:
        chats = [(prompt, effort.num_tokens) for prompt in prompts_of(effort.rounds)]
        for prompt, length in [(WARM_UP, WARM_UP_TOKENS), *chats]:
            run = resident.ask(prompt, length).run
            tokens[prompt] = run.token_ids
            tpots.append(run.tpot_s)
    return Reference(tokens, routing, Sample(tuple(tpots[1:])).median)


@contextmanager
def open_predictors(pack_dir: Path) -> Iterator[dict[str, str]]:
    """Endpoints by predictor."""
    with ExitStack() as stack:
        endpoints: dict[str, str] = {}
        for name in (PROMOE_PREDICTOR, OUR_PREDICTOR):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp")))
            running = stack.enter_context(RunningPredictor(pack_dir, folder, f"predictor.predictor={name}"))
            endpoints[name] = running.endpoint
        yield endpoints


def take_turns(paths: dict[str, SidePath], reference: Reference, effort: Effort) -> dict[str, list[ChatFigures]]:
    """Rounds over paths: neighbours in time differ in the path only; each round begins with another one."""
    figures: dict[str, list[ChatFigures]] = {name: [] for name in paths}
    for name, path in paths.items():
        reference.check(name, WARM_UP, path.ask(WARM_UP, WARM_UP_TOKENS))
        path.scores.restart()
    names = list(paths)
    for number, prompt in enumerate(prompts_of(effort.rounds)):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            one = paths[name].ask(prompt, effort.num_tokens)
            reference.check(name, prompt, one)
            figures[name].append(one)
    return figures


def measure_group(
    model: SharedModel,
    resident: SidePath,
    reference: Reference,
    endpoints: dict[str, str],
    effort: Effort,
    cache_rate: float,
) -> AblationGroup:
    """One link and cache rate."""
    slots = round(cache_rate * model.spec.num_experts)
    link_bytes_per_s = model.all_miss_nbytes / (effort.link_share * reference.tpot_s)
    with ExitStack() as stack:
        paths = {
            variant.name: stack.enter_context(
                side_path(
                    model, variant.policy, slots, link_bytes_per_s,
                    served_by(endpoints[variant.predictor]) if variant.predictor else None,
                )
            )
            for variant in variants()
        }  # fmt: skip
        # As a node does when it has started: else Python walks through the model's objects again and again.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        figures = take_turns({ALL_RESIDENT: resident, **paths}, reference, effort)
        measured = {name: Measured(figures[name], path.good_pred()) for name, path in paths.items()}
    optimum, layer_optimum = optimum_of(reference.routing, model.spec, slots)
    limits = Limits(figures[ALL_RESIDENT], optimum, layer_optimum, link_bytes_per_s, model.spec.layout.blob_nbytes)
    group = make_group(effort.link_share, cache_rate, measured, limits)
    print_group(group)
    return group


def measure(efforts: Sequence[Effort], num_threads: int) -> dict[str, object]:
    """All links and cache rates."""
    torch.set_num_threads(num_threads)
    started_s = perf_counter()
    pack_dir = demo_pack()
    groups: list[AblationGroup] = []
    with (
        open_predictors(pack_dir) as endpoints,
        shared_model(pack_dir) as model,
        side_path(model, POLICIES["lru"], model.spec.num_experts, None, None) as resident,
    ):
        resident.ask(WARM_UP, WARM_UP_TOKENS)
        for effort in efforts:
            reference = make_reference(model, resident, effort)
            groups += [
                measure_group(model, resident, reference, endpoints, effort, cache_rate)
                for cache_rate in effort.cache_rates
            ]
    return {
        "num_threads": num_threads,
        "efforts": [asdict(effort) for effort in efforts],
        "elapsed_s": perf_counter() - started_s,
        "groups": groups,
    }


def efforts_asked(arguments: Sequence[str] | None = None) -> tuple[list[Effort], argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", help=f"cache rates; default: {CACHE_RATES}, further links {FURTHER_CACHE_RATES}")
    parser.add_argument("--links", help="shares of all-miss copy to compute time", default="2,6")
    parser.add_argument("--rounds", type=int, default=5, help="of the first link; the others get 3 at most")
    parser.add_argument("--tokens", type=int, default=16, help="of the first link; the others get 10 at most")
    parser.add_argument("--threads", type=int, default=1)
    out_argument(parser)
    options = parser.parse_args(arguments)
    asked = tuple(float(rate) for rate in options.rates.split(",")) if options.rates else None
    first, *others = (float(share) for share in options.links.split(","))
    efforts = [Effort(first, asked or CACHE_RATES, options.rounds, options.tokens)]
    rounds, num_tokens = min(3, options.rounds), min(10, options.tokens)
    efforts += [Effort(share, asked or FURTHER_CACHE_RATES, rounds, num_tokens) for share in others]
    return efforts, options


def main() -> None:
    """Prints the tables, writes the JSON and the plot."""
    efforts, options = efforts_asked()
    path = write_report("ablation", measure(efforts, options.threads), options.out)
    plot_ablation(path, (options.out or RESULTS / "ablation.json").with_suffix(".png"))
    print(f"\nWritten: {path} and the plot beside it")


if __name__ == "__main__":
    main()
