"""The loop: epochs over a block source, measured on held-out documents, stopped when they get no better.

Knows no kind of predictor.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch

from predictor_service.training.token_batch import BlockTensors
from predictor_service.training.token_blocks import BlockSource, Split, TokenBlock
from predictor_service.training.trainee import Scored, Trainee
from promoe.errors import InvalidInput

_WARM_UP_STEPS: Final = 50
_MEASURED_TOKENS: Final = 1024
"""Of a batch when measuring."""


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Attributes:
        epochs: at most.
        patience: epochs without a better held-out loss after which training stops.
        batch_tokens: per step of the optimiser.
        learning_rate: of Adam.
        is_annealed: the rate falls to zero over `epochs` on a cosine; else it stays.
        seed: of weights and of the order of tokens.
        max_steps: of the optimiser, in all epochs together; None: as many as the epochs have.
        max_s: of the processor's time; None: as much as it takes.
    """

    epochs: int
    patience: int
    batch_tokens: int
    learning_rate: float
    is_annealed: bool
    seed: int
    max_steps: int | None = None
    max_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("patience", self.patience), ("batch_tokens", self.batch_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; allowed: above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}; allowed: 1 or more")
        if self.max_s is not None and not 0 < self.max_s < math.inf:
            raise ValueError(f"max_s is {self.max_s}; allowed: above 0")


@dataclass(frozen=True)
class Measured:
    """On held-out documents' decoded tokens.

    Attributes:
        loss: the objective.
        recall_A, recall_wide_A: share of a token's experts among the best k, and the best 1.5k, per lookahead.
        num_tokens: that were measured on.
    """

    loss: float
    recall_A: tuple[float, ...]
    recall_wide_A: tuple[float, ...]
    num_tokens: int


class FitProgress(Protocol):
    """Is told how far training is."""

    def advance(self, epoch: int, num_tokens: int) -> None:
        """So many more tokens of this epoch were trained on."""

    def finish_epoch(self, epoch: int, measured: Measured) -> None:
        """The epoch was measured."""


@dataclass(frozen=True)
class FitResult:
    """What training came to; the trainee holds the weights of the best epoch.

    Attributes:
        measured: of the best epoch.
        epochs: that were finished.
        num_tokens: trained on per epoch.
        was_interrupted: by Ctrl-C, after at least one epoch.
    """

    measured: Measured
    epochs: int
    num_tokens: int
    was_interrupted: bool


class Fit:
    """One training.

    Args:
        trainee: what is trained, in place.
        blocks: where tokens come from.
        prepare: makes a block a BlockTensors.
        settings: see FitSettings.
        experts_per_token: k.
    """

    def __init__(
        self,
        trainee: Trainee,
        blocks: BlockSource,
        prepare: Callable[[TokenBlock], BlockTensors],
        settings: FitSettings,
        experts_per_token: int,
    ) -> None:
        self._trainee = trainee
        self._blocks = blocks
        self._prepare = prepare
        self._settings = settings
        self._experts_per_token = experts_per_token
        self._optimizer = torch.optim.Adam(list(trainee.parameters()), lr=settings.learning_rate)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._steps = 0
        self._end_s = math.inf if settings.max_s is None else time.thread_time() + settings.max_s

    @property
    def is_over(self) -> bool:
        """There were as many steps, or as much time was used, as there may be."""
        most = self._settings.max_steps
        return (most is not None and self._steps >= most) or time.thread_time() >= self._end_s

    def run(self, progress: FitProgress) -> FitResult:
        """Trains until the epochs are over or held-out documents get no better.

        Ctrl-C ends it with the best epoch so far; before the first epoch is measured KeyboardInterrupt passes through.

        Raises:
            InvalidInput: there is nothing to train on or to measure on, or no loss is a number.
        """
        best: tuple[Measured, dict[str, torch.Tensor]] | None = None
        epoch = num_tokens = 0
        worse = 0
        was_interrupted = False
        try:
            while epoch < self._settings.epochs and worse < self._settings.patience and not (epoch and self.is_over):
                num_tokens = self._train_epoch(epoch, num_tokens, progress)
                measured = self.measure()
                epoch += 1
                if math.isfinite(measured.loss) and (best is None or measured.loss < best[0].loss):
                    best, worse = (measured, self._state()), 0
                else:
                    worse += 1
                # What people were told of is kept, so it is told last.
                progress.finish_epoch(epoch - 1, measured)
        except KeyboardInterrupt:
            if best is None:
                raise
            was_interrupted = True
        if best is None:
            raise InvalidInput("No epoch's loss on held-out documents is a number: training went astray.")
        self._restore(best[1])
        return FitResult(best[0], epoch, num_tokens, was_interrupted)

    def measure(self) -> Measured:
        """On all held-out documents."""
        totals = _Totals(self._experts_per_token)
        with torch.no_grad():
            for block in self._blocks(Split.HELD_OUT):
                tensors = self._prepare(block)
                for index_B in _parts(tensors.decode_N, _MEASURED_TOKENS):
                    batch = tensors.batch(index_B)
                    totals.add(float(self._trainee.loss(batch)), len(index_B), self._trainee.scored(batch))
        return totals.measured()

    def _train_epoch(self, epoch: int, total_tokens: int, progress: FitProgress) -> int:
        done = 0
        for block in self._blocks(Split.TRAIN):
            tensors = self._prepare(block)
            for index_B in self._shuffled(tensors.decode_N):
                if done and self.is_over:
                    return done
                share = done / total_tokens if total_tokens else 0.0
                self._step(tensors, index_B, (epoch + min(share, 1.0)) / self._settings.epochs)
                done += len(index_B)
                progress.advance(epoch, len(index_B))
        if not done:
            raise InvalidInput("There are no decoded tokens to train on: the traces are empty, or all held out.")
        return done

    def _shuffled(self, index_N: torch.Tensor) -> Iterator[torch.Tensor]:
        order_N = torch.randperm(len(index_N), generator=self._generator)
        yield from _parts(index_N[order_N], self._settings.batch_tokens)

    def _step(self, tensors: BlockTensors, index_B: torch.Tensor, done_share: float) -> None:
        rate = self._settings.learning_rate * min(1.0, (self._steps + 1) / _WARM_UP_STEPS)
        if self._settings.is_annealed:
            rate *= (1 + math.cos(math.pi * done_share)) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss = self._trainee.loss(tensors.batch(index_B))
        loss.backward()
        self._optimizer.step()
        self._steps += 1

    def _state(self) -> dict[str, torch.Tensor]:
        return {str(index): copy.deepcopy(p.detach()) for index, p in enumerate(self._trainee.parameters())}

    def _restore(self, state: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for index, parameter in enumerate(self._trainee.parameters()):
                parameter.copy_(state[str(index)])


def _parts(index_N: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """Of no indices there are no parts, where torch makes an empty one."""
    if len(index_N):
        yield from index_N.split(size)


class _Totals:
    """Sums over batches."""

    def __init__(self, experts_per_token: int) -> None:
        self._widths = (experts_per_token, experts_per_token * 3 // 2)
        self._experts_per_token = experts_per_token
        self._loss = 0.0
        self._num_tokens = 0
        self._found_WA: np.ndarray = np.zeros(0)
        self._routed_A: np.ndarray = np.zeros(0)

    def add(self, loss: float, num_tokens: int, scored: Scored) -> None:
        """One batch."""
        self._loss += loss * num_tokens
        self._num_tokens += num_tokens
        valid_PAB = scored.valid_PAB.expand(scored.scores_PABE.shape[:3])
        found = []
        for width in self._widths:
            best_PABW = scored.scores_PABE.topk(min(width, scored.scores_PABE.shape[3]), dim=3).indices
            hits_PAB = scored.routed_PABE.gather(3, best_PABW).sum(dim=3)
            found.append((hits_PAB * valid_PAB).sum(dim=(0, 2)).numpy())
        routed_A = valid_PAB.sum(dim=(0, 2)).numpy() * self._experts_per_token
        if not len(self._routed_A):
            self._found_WA, self._routed_A = np.zeros((len(found), len(routed_A))), np.zeros(len(routed_A))
        self._found_WA += np.stack(found)
        self._routed_A += routed_A

    def measured(self) -> Measured:
        """Raises InvalidInput if there was nothing."""
        if not self._num_tokens:
            raise InvalidInput("There are no held-out decoded tokens to measure on: record more documents.")
        recall_WA = self._found_WA / np.maximum(self._routed_A, 1)
        return Measured(
            loss=self._loss / self._num_tokens,
            recall_A=tuple(recall_WA[0].tolist()),
            recall_wide_A=tuple(recall_WA[1].tolist()),
            num_tokens=self._num_tokens,
        )
