"""What may limit an answer's tokens: a seam between what is asked for and how a token is drawn. Knows no grammar."""

from typing import Protocol

import torch


class TokenConstraint(Protocol):
    """Says before each draw which tokens may come. Used by one request, on the engine's thread.

    Raises:
        PromoeError: it cannot go on; the request fails, its neighbours do not.
    """

    def forbid(self, scores_V: torch.Tensor) -> torch.Tensor:
        """Scores of shape (V,), with minus infinity where a token may not come; at least one may."""

    def accept(self, token_id: int) -> None:
        """The token was drawn."""
