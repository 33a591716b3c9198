"""What a predictor's session is told, made up: steps of tokens whose routing and hidden states a test decides."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from predictor_service.predictor import PredictorSession, PredictorSource
from promoe.hint import Float32Array, Hint, IdArray, LayerRouting, Observation, StepSpan, StepStart
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec

NO_PACK = Path("/no/pack")


def make_spec(
    layers: int = 6, experts: int = 8, per_token: int = 2, hidden: int = 16, family: str = "mixtral"
) -> ModelSpec:
    """A model of any geometry."""
    return ModelSpec(
        name="made up",
        family=family,
        fingerprint="0badcafe",
        num_moe_layers=layers,
        num_experts=experts,
        experts_per_token=per_token,
        hidden_size=hidden,
        vocab_size=100,
        max_context_tokens=64,
        layout=ExpertLayout.of(Dtype.FLOAT32, {"down_proj": (hidden, 4)}),
    )


def source_of(spec: ModelSpec, pack: Path = NO_PACK, lookahead: int | None = None) -> PredictorSource:
    """Without an artifact."""
    return PredictorSource(spec, pack, None, lookahead)


def decode_start(step: int, *request_ids: str) -> StepStart:
    """One token of each request (of `r1` if none is named)."""
    return StepStart(step, tuple(StepSpan(name, 1, is_prefill=False) for name in request_ids or ("r1",)))


def prefill_start(step: int, num_tokens: int) -> StepStart:
    """A prompt's step."""
    return StepStart(step, (StepSpan("r1", num_tokens, is_prefill=True),))


def observed(
    step: int, layer: int, topk_ids_RK: IdArray, hidden_RD: Float32Array | None = None, num_tokens: int | None = None
) -> Observation:
    """A layer with its own routing; all tokens are sampled unless there are more."""
    num_rows = len(topk_ids_RK)
    routings = (LayerRouting(layer, topk_ids_RK.astype(np.uint16)),)
    return Observation(step, layer, tuple(range(num_rows)), num_tokens or num_rows, hidden_RD, routings)


def serve_step(
    session: PredictorSession, start: StepStart, routing_LRK: IdArray, hidden_LRD: Float32Array | None = None
) -> Iterator[Hint]:
    """Tells a whole step layer by layer; yields the hints as they come."""
    session.begin_step(start)
    for layer, topk_ids_RK in enumerate(routing_LRK):
        hidden_RD = None if hidden_LRD is None else hidden_LRD[layer]
        yield from session.observe(observed(start.step, layer, topk_ids_RK, hidden_RD, start.num_tokens))


def recall(hint: Hint, needed: Sequence[int]) -> float:
    """Share of the needed experts among as many of the first hinted ones."""
    return len({*hint.experts[: len(needed)].tolist()} & {*needed}) / len(needed)


def calibration_error(scores: Sequence[float], needed: Sequence[bool], num_bins: int = 10) -> float:
    """Expected calibration error: mean distance of score and frequency, over bins of the score."""
    scores_N, needed_N = np.asarray(scores), np.asarray(needed, np.float64)
    bin_N = np.minimum((scores_N * num_bins).astype(int), num_bins - 1)
    errors = [
        abs(scores_N[bin_N == number].mean() - needed_N[bin_N == number].mean()) * (bin_N == number).mean()
        for number in range(num_bins)
        if (bin_N == number).any()
    ]
    return float(sum(errors))
