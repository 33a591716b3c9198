"""Which documents are held: a random sample of all that were seen, in which old ones are the rarer the older they are.

A document that was seen at time t weighs 2 ** (t / half_life). Sampling by weight without replacement keeps those with
the largest keys log(weight) + g, g a Gumbel number drawn once (Efraimidis and Spirakis, 2006): so a document's key
never changes, and making room is forgetting the smallest.
"""

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from predictor_service.learner.document import Document, blocks_of
from predictor_service.training.token_blocks import Split, TokenBlock, split_of
from promoe.hint import ObservedKind

_SPLIT_SEED = 0


@dataclass(order=True, frozen=True)
class _Held:
    key: float
    number: int
    document: Document = field(compare=False)
    at_s: float = field(compare=False)


class Reservoir:
    """Bounded in bytes.

    Args:
        max_nbytes: of all documents.
        half_life_s: see LearnerConfig.
        seed: of the sample.
    """

    def __init__(self, max_nbytes: int, half_life_s: float, seed: int = 0) -> None:
        self._max_nbytes = max_nbytes
        self._half_life_s = half_life_s
        self._random = random.Random(seed)
        self._heap: list[_Held] = []
        self.num_seen = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, document: Document, now_s: float) -> list[Document]:
        """Takes one in; returns those that were given up for it, which it may be itself.

        Args:
            document: that is over.
            now_s: on any clock that counts up.
        """
        self.num_seen += 1
        gumbel = -math.log(-math.log(self._random.uniform(1e-12, 1 - 1e-12)))
        key = now_s / self._half_life_s * math.log(2) + gumbel
        heapq.heappush(self._heap, _Held(key, self.num_seen, document, now_s))
        self.nbytes += document.nbytes
        return self.make_room(0)

    def make_room(self, nbytes: int) -> list[Document]:
        """Gives documents up until so many bytes are free; returns them."""
        given_up: list[Document] = []
        while self._heap and self.nbytes + nbytes > self._max_nbytes:
            given_up.append(heapq.heappop(self._heap).document)
            self.nbytes -= given_up[-1].nbytes
        return given_up

    def documents(self) -> list[Document]:
        """Those that are held, oldest first."""
        return [held.document for held in sorted(self._heap, key=lambda held: held.number)]

    def num_tokens(self) -> int:
        """Of all documents."""
        return sum(len(held.document.tokens) for held in self._heap)

    def oldest_age_s(self, now_s: float) -> float:
        """Of the documents that are held; 0 where there is none."""
        return max((now_s - held.at_s for held in self._heap), default=0.0)

    def check_integrity(self) -> None:
        """Raises AssertionError when the books are wrong."""
        assert self.nbytes == sum(held.document.nbytes for held in self._heap), "bytes are those of the documents"
        assert self.nbytes <= self._max_nbytes, "the bound holds"
        assert len({held.number for held in self._heap}) == len(self._heap), "a document is held once"


@dataclass(frozen=True)
class DocumentBlocks:
    """A BlockSource of documents: always the same ones, whatever is seen meanwhile.

    Attributes:
        documents: all of one kind of hidden states.
        held_out_share: of them, by a hash of their names: a document never changes sides.
        block_nbytes: of hidden states per block.
    """

    documents: tuple[Document, ...]
    held_out_share: float
    block_nbytes: int

    @classmethod
    def of(
        cls, documents: list[Document], observed: ObservedKind, held_out_share: float, block_nbytes: int
    ) -> "DocumentBlocks":
        """Those that hold these hidden states."""
        fitting = tuple(document for document in documents if document.observed is observed)
        return cls(fitting, held_out_share, block_nbytes)

    def __call__(self, split: Split) -> Iterator[TokenBlock]:
        """Blocks of this side's documents."""
        chosen = [
            document
            for document in self.documents
            if split_of(document.name, self.held_out_share, _SPLIT_SEED) is split
        ]
        yield from blocks_of(chosen, self.block_nbytes)
