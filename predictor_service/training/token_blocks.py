"""Recorded tokens in blocks that fit memory: a trace is passed over once per epoch, whatever its size.

Shapes: S sources (hidden states per token: one per MoE layer, and where it was recorded the last output), N tokens of a
block, L MoE layers, D hidden, K experts per token.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from predictor_service.trace_playback import RecordedStep, recorded_steps
from promoe.errors import InvalidInput, ModelMismatch
from promoe.hint import Float32Array, ObservedKind, StepSpan
from promoe.trace_events import LayerEvent
from promoe.trace_file import TraceReader

BLOCK_NBYTES: Final = 640 << 20
"""Of hidden states that are held at once; batches are drawn at random from one block."""

_BFLOAT16_SHIFT: Final = 16


class Split(Enum):
    """Whole documents are trained on or measured on, never tokens of one document on both."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """Tokens of some documents; those of one document are neighbours, in their order.

    Attributes:
        hidden_SND: the bits of bfloat16.
        topk_ids_LNK: routed experts.
        document_N: a number per document.
        is_decode_N: False for the tokens of a prompt.
        seen_SN: False where hidden states are not known, and are zeros; None where all are.
    """

    hidden_SND: npt.NDArray[np.uint16]
    topk_ids_LNK: npt.NDArray[np.uint16]
    document_N: npt.NDArray[np.int64]
    is_decode_N: npt.NDArray[np.bool_]
    seen_SN: npt.NDArray[np.bool_] | None = None

    @property
    def known_SN(self) -> npt.NDArray[np.bool_]:
        """`seen_SN`, where all are seen too."""
        return np.ones(self.hidden_SND.shape[:2], np.bool_) if self.seen_SN is None else self.seen_SN


BlockSource: TypeAlias = Callable[[Split], Iterator[TokenBlock]]
"""Passes over the documents of one side once."""


def split_of(document: str, held_out_share: float, seed: int) -> Split:
    """Which side a document is on: always the same, whatever else there is."""
    digest = hashlib.blake2b(f"{seed}:{document}".encode(), digest_size=8).digest()
    return Split.HELD_OUT if int.from_bytes(digest) < held_out_share * 2**64 else Split.TRAIN


@dataclass(eq=False)
class _Document:
    """What was gathered of one request since the last block."""

    hidden: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    topk_ids: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    is_decode: list[bool] = field(default_factory=list)


class TraceBlocks:
    """Blocks of recorded traces; a BlockSource.

    Args:
        paths: of trace files, all of one model.
        observed: which hidden states are wanted.
        held_out_share: of the documents, 0 to 1.
        seed: of the split.
        block_nbytes: of hidden states per block.

    Raises:
        ModelNotFound, InvalidInput: a file that is no trace, or that lacks these hidden states.
        ModelMismatch: traces of different models.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        observed: ObservedKind,
        held_out_share: float,
        seed: int,
        block_nbytes: int = BLOCK_NBYTES,
    ) -> None:
        self._readers = [TraceReader(path) for path in paths]
        self._observed = observed
        self._held_out_share = held_out_share
        self._seed = seed
        self._block_nbytes = block_nbytes
        self.model = self._readers[0].header.model
        for reader in self._readers[1:]:
            if reader.header.model.fingerprint != self.model.fingerprint:
                raise ModelMismatch(
                    f"{self._readers[0].path} is of {self.model.name} (fingerprint {self.model.fingerprint}), "
                    f"{reader.path} of {reader.header.model.name} (fingerprint {reader.header.model.fingerprint})."
                )

    def __call__(self, split: Split) -> Iterator[TokenBlock]:
        """Blocks of this side's documents."""
        pending: dict[str, _Document] = {}
        pending_nbytes = 0
        is_empty = True
        for number, reader in enumerate(self._readers):
            for step in recorded_steps(reader, hidden=True):
                for document, hidden_SD, topk_ids_LK, is_decode in self._tokens(step, reader.path):
                    is_empty = False
                    name = f"{number}:{document}"
                    if split_of(name, self._held_out_share, self._seed) is not split:
                        continue
                    entry = pending.setdefault(name, _Document())
                    entry.hidden.append(hidden_SD)
                    entry.topk_ids.append(topk_ids_LK)
                    entry.is_decode.append(is_decode)
                    pending_nbytes += hidden_SD.nbytes
                if pending_nbytes >= self._block_nbytes:
                    yield _block(pending.values())
                    pending, pending_nbytes = {}, 0
            if is_empty:
                raise InvalidInput(
                    f"{reader.path} holds no {self._observed.value}: record it with `promoe trace record`, hidden "
                    "states included."
                )
        if pending:
            yield _block(pending.values())

    def _tokens(
        self, step: RecordedStep, path: Path
    ) -> Iterator[tuple[str, npt.NDArray[np.uint16], npt.NDArray[np.uint16], bool]]:
        """Of every sampled token of the step: document, (S, D), (L, K), whether it was decoded."""
        layers = step.layers
        hidden: list[Float32Array | None] = [self._hidden(event) for event in layers]
        if self._observed is ObservedKind.LAYER_INPUT:
            hidden.append(layers[-1].last_output_RD)
        if any(hidden_RD is None for hidden_RD in hidden):
            return
        hidden_SRD = np.stack([_bfloat16_bits(hidden_RD) for hidden_RD in hidden if hidden_RD is not None])
        if hidden_SRD.shape[2] != self.model.hidden_size:
            raise InvalidInput(f"{path}: hidden states have {hidden_SRD.shape[2]} values, not those of its model.")
        rows = list(layers[0].rows)
        topk_ids_LRK = np.stack([event.topk_ids_TK[rows] for event in layers])
        spans = _span_of_rows(step.start.spans, rows)
        for row, span in enumerate(spans):
            yield span.request_id, hidden_SRD[:, row], topk_ids_LRK[:, row], not span.is_prefill

    def _hidden(self, event: LayerEvent) -> Float32Array | None:
        return event.layer_input_RD if self._observed is ObservedKind.LAYER_INPUT else event.router_input_RD


def _bfloat16_bits(hidden_RD: Float32Array) -> npt.NDArray[np.uint16]:
    """Traces hold bfloat16, so nothing is lost."""
    bits = np.ascontiguousarray(hidden_RD, np.float32).view(np.uint32) >> _BFLOAT16_SHIFT
    return bits.astype(np.uint16)


def _span_of_rows(spans: Sequence[StepSpan], rows: Sequence[int]) -> list[StepSpan]:
    ends = np.cumsum([span.num_tokens for span in spans])
    return [spans[index] for index in np.searchsorted(ends, rows, side="right")]


def _block(documents: Iterable[_Document]) -> TokenBlock:
    gathered = list(documents)
    return TokenBlock(
        hidden_SND=np.stack([token for entry in gathered for token in entry.hidden], axis=1),
        topk_ids_LNK=np.stack([token for entry in gathered for token in entry.topk_ids], axis=1),
        document_N=np.repeat(np.arange(len(gathered)), [len(entry.is_decode) for entry in gathered]),
        is_decode_N=np.array([flag for entry in gathered for flag in entry.is_decode]),
    )
