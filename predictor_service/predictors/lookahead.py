"""How far a predictor looks ahead: what was asked for, or its own distance, as far as the model has layers."""

from dataclasses import replace

from predictor_service.predictor import PredictorSource
from promoe.hint import PredictorVersion


def at_lookahead(version: PredictorVersion, source: PredictorSource) -> PredictorVersion:
    """The version at the one lookahead it predicts at, named after it where that is not its own distance."""
    (own,) = version.lookaheads
    lookahead = min(source.lookahead or own, source.spec.num_moe_layers)
    if lookahead == own:
        return version
    return replace(version, version=f"{version.version}+l{lookahead}", lookaheads=(lookahead,))
