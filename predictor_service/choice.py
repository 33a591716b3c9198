"""Which predictor serves: the one that was asked for, or for `auto` the best that the model and the pack allow."""

import logging
from typing import Final

from predictor_service.config import AUTO
from predictor_service.plugins import installed_predictors, make_predictor
from predictor_service.predictor import Predictor, PredictorSource
from promoe.config import SettingUnfit
from promoe.errors import ModelNotFound, ModelUnsupported

logger = logging.getLogger(__name__)

AUTO_ORDER: Final = ("learned", "gate_ahead", "transition")
"""Best first; each fits the source or refuses it with a reason, and the last one always fits."""


def choose_predictor(name: str, source: PredictorSource) -> Predictor:
    """Makes the predictor that was asked for.

    Raises:
        SettingUnfit: no plug-in of that name is installed, or it does not predict at the lookahead that was asked for.
        PromoeError: the plug-in refuses the source.
    """
    predictor = _automatic(source) if name == AUTO else make_predictor(name, source)
    known = predictor.version.lookaheads
    if source.lookahead is not None and source.lookahead not in known:
        raise SettingUnfit(
            f"predictor.lookahead is {source.lookahead}; {predictor.version.version} predicts "
            f"{', '.join(map(str, known)) or 'nothing'}{' layers ahead' if known else ''}"
        )
    return predictor


def _automatic(source: PredictorSource) -> Predictor:
    if source.artifact is not None:
        return make_predictor(AUTO_ORDER[0], source)
    installed = installed_predictors()
    *better, last = [name for name in AUTO_ORDER if name in installed] or [AUTO_ORDER[-1]]
    for candidate in better:
        try:
            return make_predictor(candidate, source)
        except (ModelNotFound, ModelUnsupported) as reason:
            logger.info("Not %s: %s", candidate, reason)
    return make_predictor(last, source)
