"""What a hint must be before the expert cache sees it: a predictor may be wrong, but it may not confuse the cache."""

import math
from collections.abc import Mapping

from promoe.hint import Hint, PredictorVersion
from promoe.trace_events import HintFate

_LARGEST_SCORE = 1.0 + 1e-3
"""A probability, and what rounding may add to it."""


def fault_of(
    hint: Hint, num_layers: int, num_experts: int, announced: Mapping[str, PredictorVersion]
) -> HintFate | None:
    """INVALID or WRONG_VERSION, or None for a hint that can be used.

    Args:
        hint: as it was decoded.
        num_layers: MoE layers of the model.
        num_experts: of each layer.
        announced: the versions whose hints are taken, by name.
    """
    version = announced.get(hint.version)
    if version is None:
        return HintFate.WRONG_VERSION
    # From an observation of the step or the one before it, at most one pass through the layers ago.
    lookahead = hint.lookahead(num_layers)
    experts: list[int] = hint.experts.tolist()
    scores: list[float] = hint.scores.tolist()
    fits_the_model = hint.layer < num_layers and (not experts or max(experts) < num_experts)
    fits_the_model = fits_the_model and 0 <= lookahead <= num_layers and hint.observed_layer <= num_layers
    is_a_ranking = len(experts) == len(scores) == len(set(experts))
    # The sum is no number when one of them is none, and cannot overflow with 32-bit scores.
    has_numbers = math.isfinite(sum(scores))
    if not (fits_the_model and is_a_ranking and has_numbers) or hint.num_expected > num_experts:
        return HintFate.INVALID
    if version.calibrated and scores and not (min(scores) >= 0.0 and max(scores) <= _LARGEST_SCORE):
        return HintFate.INVALID
    return None
