"""A document: one request's tokens as they were seen, with hidden states and routing, and how they become blocks.

Shapes: S sources (MoE layers, and for layer inputs the last output), V of them seen, L MoE layers, N tokens, D hidden,
K experts per token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from predictor_service.training.token_blocks import TokenBlock
from promoe.hint import Float32Array, IdArray, ObservedKind

_BFLOAT16_SHIFT = 16

BitsArray = npt.NDArray[np.uint16]


def bfloat16_bits(hidden: Float32Array) -> BitsArray:
    """Cut to bfloat16, which most models compute in: traces hold it, and training reads it."""
    bits = np.ascontiguousarray(hidden, np.float32).view(np.uint32) >> _BFLOAT16_SHIFT
    return bits.astype(np.uint16)


@dataclass(frozen=True, eq=False)
class SeenToken:
    """One token over all layers.

    Attributes:
        hidden_VD: bits of bfloat16, of the sources that were seen.
        seen_S: which these are.
        topk_ids_LK: its routing.
        is_decode: it was generated.
        follows: it comes right behind the document's token before.
    """

    hidden_VD: BitsArray
    seen_S: npt.NDArray[np.bool_]
    topk_ids_LK: IdArray
    is_decode: bool
    follows: bool

    @property
    def nbytes(self) -> int:
        """Held in memory."""
        return self.hidden_VD.nbytes + self.seen_S.nbytes + self.topk_ids_LK.nbytes


@dataclass(eq=False)
class Document:
    """Tokens of one request, in their order; not of one it was cut after.

    Attributes:
        name: unique over sessions.
        observed: which hidden states there are.
        tokens: see SeenToken.
        nbytes: that they hold.
    """

    name: str
    observed: ObservedKind
    tokens: list[SeenToken] = field(default_factory=list)
    nbytes: int = 0

    def add(self, token: SeenToken) -> None:
        """Behind the others."""
        self.tokens.append(token)
        self.nbytes += token.nbytes

    @property
    def num_decoded(self) -> int:
        """Tokens that were generated: those that training measures by."""
        return sum(token.is_decode for token in self.tokens)


def block_of(documents: Iterable[Document]) -> TokenBlock:
    """All their tokens; a gap inside of a document begins what training takes for another one."""
    tokens = [token for document in documents for token in document.tokens]
    starts_N = np.array([not token.follows for token in tokens])
    return TokenBlock(
        hidden_SND=np.stack([_spread(token) for token in tokens], axis=1),
        topk_ids_LNK=np.stack([token.topk_ids_LK for token in tokens], axis=1),
        document_N=np.cumsum(starts_N),
        is_decode_N=np.array([token.is_decode for token in tokens]),
        seen_SN=np.stack([token.seen_S for token in tokens], axis=1),
    )


def blocks_of(documents: Sequence[Document], block_nbytes: int) -> Iterable[TokenBlock]:
    """Blocks of whole documents, of so many bytes of hidden states or a document more."""
    waiting: list[Document] = []
    nbytes = 0
    for document in documents:
        waiting.append(document)
        first = document.tokens[0]
        nbytes += len(document.tokens) * len(first.seen_S) * first.hidden_VD.shape[1] * first.hidden_VD.itemsize
        if nbytes >= block_nbytes:
            yield block_of(waiting)
            waiting, nbytes = [], 0
    if waiting:
        yield block_of(waiting)


def _spread(token: SeenToken) -> BitsArray:
    """(S, D): zeros where nothing was seen."""
    hidden_SD = np.zeros((len(token.seen_S), token.hidden_VD.shape[1]), np.uint16)
    hidden_SD[token.seen_S] = token.hidden_VD
    return hidden_SD
