"""The logistic function."""

from typing import Final

import numpy as np

from promoe.hint import Float32Array

_LOWEST: Final = np.float32(-60)
"""Its exponential is still a number."""


def sigmoid(logits: Float32Array) -> Float32Array:
    """Probabilities of log-odds."""
    probability: Float32Array = (1 / (1 + np.exp(-np.maximum(logits, _LOWEST)))).astype(np.float32, copy=False)
    return probability
