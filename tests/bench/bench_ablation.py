"""What each part of proactive caching is worth: from reactive LRU to ProMoE to ours, over the cache rate.

Every row has all parts of the rows above it. All rows of one cache rate take turns on the same greedy chats in one
process, over one loaded model; predictors are services in their own processes. The link is emulated: loading every
expert of a token takes 2 (or 6) times as long as computing it all resident, measured first. Beside the rows: all
resident, the offline optimum's hits (Belady, slots shared by all layers) and the floor, max(compute all resident,
the optimum's bytes / link rate). Every row must give the same tokens; the run fails otherwise.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import torch

from compute_node.replay.belady import PhaseHits, Visit, belady
from compute_node.schedule import POLICIES
from promoe.model_spec import ModelSpec
from tests.bench.ablation_plot import plot_ablation
from tests.bench.ablation_table import AblationGroup, Limits, Measured, make_group, print_group
from tests.bench.ablation_variants import OUR_PREDICTOR, PROMOE_PREDICTOR, variants
from tests.bench.decode_loop import recorded_routing
from tests.bench.demo_model import PROMPTS, demo_pack
from tests.bench.hint_sources import served_by
from tests.bench.report import RESULTS, Sample, out_argument, write_report
from tests.bench.side_by_side import ChatFigures, SharedModel, SidePath, shared_model, side_path
from tests.running_predictor import RunningPredictor

CACHE_RATES: Final = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
WARM_UP: Final = PROMPTS[-1]
WARM_UP_TOKENS: Final = 16
ALL_RESIDENT: Final = "all resident"


@dataclass(frozen=True)
class Effort:
    """How much is measured. `rounds` and `num_tokens`: of each link's share of all-miss copy to compute time."""

    cache_rates: tuple[float, ...]
    rounds: dict[float, int]
    num_tokens: dict[float, int]

    @property
    def link_shares(self) -> tuple[float, ...]:
        """All-miss copy time divided by all-resident compute time."""
        return tuple(self.rounds)


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


def make_reference(model: SharedModel, resident: SidePath, rounds: int, num_tokens: int) -> Reference:
    """Answers the warm-up and every round's chat once."""
    tokens: dict[str, tuple[int, ...]] = {}
    tpots: list[float] = []
    with recorded_routing(model.loaded.experts_modules) as routing:
        for prompt, length in [(WARM_UP, WARM_UP_TOKENS), *((prompt, num_tokens) for prompt in prompts_of(rounds))]:
            run = resident.ask(prompt, length).run
            tokens[prompt] = run.token_ids
            tpots.append(run.tpot_s)
    return Reference(tokens, routing, Sample(tuple(tpots[1:])).median)


def optimum_of(routing: list[list[Visit]], spec: ModelSpec, slots_per_layer: int) -> tuple[PhaseHits, PhaseHits]:
    """Belady with slots shared by all layers, and with equal ones; both begin with the warmed experts."""
    layers = range(spec.num_moe_layers)
    per_layer = [belady(routing[layer], slots_per_layer, range(slots_per_layer)) for layer in layers]
    numbered = [
        Visit(frozenset(layer * spec.num_experts + expert for expert in visit.experts), visit.is_decode)
        for step in zip(*routing, strict=True)
        for layer, visit in enumerate(step)
    ]
    resident = [layer * spec.num_experts + expert for layer in layers for expert in range(slots_per_layer)]
    shared = belady(numbered, slots_per_layer * spec.num_moe_layers, resident)
    first, *others = per_layer
    return shared, sum(others, first)


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


def take_turns(
    paths: dict[str, SidePath], reference: Reference, rounds: int, num_tokens: int
) -> dict[str, list[ChatFigures]]:
    """Rounds over paths: neighbours in time differ in the path only; each round begins with another one."""
    figures: dict[str, list[ChatFigures]] = {name: [] for name in paths}
    for name, path in paths.items():
        reference.check(name, WARM_UP, path.ask(WARM_UP, WARM_UP_TOKENS))
        path.scores.restart()
    names = list(paths)
    for number, prompt in enumerate(prompts_of(rounds)):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            one = paths[name].ask(prompt, num_tokens)
            reference.check(name, prompt, one)
            figures[name].append(one)
    return figures


def measure_group(
    model: SharedModel,
    resident: SidePath,
    reference: Reference,
    endpoints: dict[str, str],
    effort: Effort,
    case: tuple[float, float],
) -> AblationGroup:
    """One link (as share) and cache rate."""
    link_share, cache_rate = case
    slots = round(cache_rate * model.spec.num_experts)
    link_bytes_per_s = model.all_miss_nbytes / (link_share * reference.tpot_s)
    rounds, num_tokens = effort.rounds[link_share], effort.num_tokens[link_share]
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
        figures = take_turns({ALL_RESIDENT: resident, **paths}, reference, rounds, num_tokens)
        measured = {name: Measured(figures[name], path.good_pred()) for name, path in paths.items()}
    optimum, layer_optimum = optimum_of(reference.routing, model.spec, slots)
    limits = Limits(figures[ALL_RESIDENT], optimum, layer_optimum, link_bytes_per_s, model.spec.layout.blob_nbytes)
    group = make_group(link_share, cache_rate, measured, limits)
    print_group(group)
    return group


def measure(effort: Effort, num_threads: int) -> dict[str, object]:
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
        for link_share in effort.link_shares:
            rounds, num_tokens = effort.rounds[link_share], effort.num_tokens[link_share]
            reference = make_reference(model, resident, rounds, num_tokens)
            for cache_rate in effort.cache_rates:
                case = link_share, cache_rate
                groups.append(measure_group(model, resident, reference, endpoints, effort, case))
    return {
        "num_threads": num_threads,
        "rounds": {f"{share:g}": rounds for share, rounds in effort.rounds.items()},
        "num_tokens": {f"{share:g}": tokens for share, tokens in effort.num_tokens.items()},
        "elapsed_s": perf_counter() - started_s,
        "groups": groups,
    }


def effort_asked(arguments: Sequence[str] | None = None) -> tuple[Effort, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", help="cache rates, with commas between", default=",".join(map(str, CACHE_RATES)))
    parser.add_argument("--links", help="shares of all-miss copy to compute time", default="2,6")
    parser.add_argument("--rounds", type=int, default=5, help="of the first link; the others get 3 at most")
    parser.add_argument("--tokens", type=int, default=24, help="of the first link; the others get 12 at most")
    parser.add_argument("--threads", type=int, default=1)
    out_argument(parser)
    options = parser.parse_args(arguments)
    shares = [float(share) for share in options.links.split(",")]
    effort = Effort(
        tuple(float(rate) for rate in options.rates.split(",")),
        {share: options.rounds if share == shares[0] else min(3, options.rounds) for share in shares},
        {share: options.tokens if share == shares[0] else min(12, options.tokens) for share in shares},
    )
    return effort, options


def main() -> None:
    """Prints the tables, writes the JSON and the plot."""
    effort, options = effort_asked()
    path = write_report("ablation", measure(effort, options.threads), options.out)
    plot_ablation(path, (options.out or RESULTS / "ablation.json").with_suffix(".png"))
    print(f"\nWritten: {path} and the plot beside it")


if __name__ == "__main__":
    main()
