"""A seeded walk through steps, layers, hints and loads; prints everything that was decided, and when in virtual time.

Run as a script, so that the same walk can be taken by compiled and by interpreted code: `placement_walk.py SEED`.
"""

import random
import sys

import numpy as np

from compute_node.clocked_transfers import ClockedTransfers, LinkModel
from compute_node.compilation import execution
from compute_node.expert_cache import CacheSurroundings, ExpertCache
from compute_node.hint_inbox import HintInbox, ReceivedHint
from compute_node.hint_quality import HintScores
from compute_node.replay.virtual_clock import VirtualClock, VirtualMarks
from compute_node.schedule import POLICIES, SchedulePolicy
from compute_node.slots import CacheGeometry
from promoe.hint import Hint, StepSpan, StepStart
from promoe.trace_events import HintEvent, LayerEvent, LoadEvent, TraceEvent

GEOMETRY = CacheGeometry(num_layers=5, num_experts=24, slots_per_layer=7, blob_nbytes=1 << 20, experts_per_token=3)
NUM_STEPS = 25


def told(event: TraceEvent) -> str:
    """One line."""
    if isinstance(event, LayerEvent):
        return f"layer {event.at_s!r} {event.layer} {event.hits} {event.misses} {event.late} {event.stall_s!r}"
    if isinstance(event, LoadEvent):
        return f"load {event.at_s!r} {event.expert} {event.reason.value} {event.nbytes} {event.end_s!r}"
    if isinstance(event, HintEvent):
        return f"hint {event.at_s!r} {event.fate.value} {event.hint.layer}"
    return f"step {event.step} {event.link_bytes_per_s!r}"


def tell(event: TraceEvent) -> None:
    """A sink of the expert cache."""
    sys.stdout.write(told(event) + "\n")


def hint_of(chance: random.Random, step: int, observed_layer: int) -> Hint:
    """For one of the next layers, wherever they are."""
    layer = observed_layer + chance.randint(0, 2)
    target_step, layer = step + layer // GEOMETRY.num_layers, layer % GEOMETRY.num_layers
    experts = chance.sample(range(GEOMETRY.num_experts), 5)
    scores = sorted((chance.random() for _ in experts), reverse=True)
    return Hint(
        step=target_step,
        layer=layer,
        observed_step=step,
        observed_layer=observed_layer,
        experts=np.array(experts, np.uint16),
        scores=np.array(scores, np.float32),
        num_expected=3,
        version="walk@1",
    )


def walk(policy: SchedulePolicy, chance: random.Random) -> None:
    """Prints what one policy does."""
    clock, inbox = VirtualClock(), HintInbox()
    link = LinkModel(1e9, chunk_s=1e-5)
    transfers = ClockedTransfers(clock, link, policy.chunk_settings(GEOMETRY.blob_nbytes))
    surroundings = CacheSurroundings(VirtualMarks(clock), transfers, lambda expert: 0, inbox, clock)
    expert_cache = ExpertCache(range(GEOMETRY.num_slots), GEOMETRY, policy, surroundings)
    scores = HintScores(GEOMETRY.num_layers)
    expert_cache.sinks += [tell, scores]
    for step in range(1, NUM_STEPS + 1):
        num_tokens = chance.choice([1, 1, 1, 20])
        expert_cache.begin_step(StepStart(step, (StepSpan("a", num_tokens, num_tokens > 1),), ()))
        for layer in range(GEOMETRY.num_layers):
            if chance.random() < 0.8:
                inbox.put(ReceivedHint(hint_of(chance, step, layer), 1e-4))
            expert_cache.notice()
            clock.advance(chance.uniform(0.0, 0.004))
            rows = [chance.sample(range(GEOMETRY.num_experts), 3) for _ in range(num_tokens)]
            needed = list(dict.fromkeys(expert for row in rows for expert in row))
            with expert_cache.acquire(layer, needed, np.array(rows, np.uint16)) as acquisition:
                for expert, slot in expert_cache.arrivals(acquisition):
                    sys.stdout.write(f"computed {expert} in {slot}\n")
                    clock.advance(0.0002)
        expert_cache.check_integrity()
    sys.stdout.write(f"{scores.scores()} {expert_cache.prefetch_counters} {expert_cache.snapshot()}\n")


def main(seed: int) -> None:
    """Every policy, one after the other."""
    sys.stderr.write(execution().value)
    for policy in POLICIES.values():
        walk(policy, random.Random(seed))


if __name__ == "__main__":
    main(int(sys.argv[1]))
