"""Trains one candidate in a thread of its own, slowly enough to leave the processor to those who serve."""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from predictor_service.learner.config import NICEST, LearnerConfig
from predictor_service.learner.control import CandidateTrained, Train, TrainingFailed
from predictor_service.learner.document import Document
from predictor_service.learner.reservoir import DocumentBlocks
from predictor_service.learner.stage import SERVED_TRAFFIC, SOURCE_KEY
from predictor_service.registry import VersionName
from promoe.errors import InvalidInput, PromoeError
from promoe.hint import ObservedKind
from promoe.model_spec import ModelSpec

if TYPE_CHECKING:  # torch takes seconds and hundreds of megabytes: only who trains loads it
    from predictor_service.training.fit import Measured

logger = logging.getLogger(__name__)

BLOCK_NBYTES: Final = 64 << 20
"""Of hidden states that are spread out for training at once, beside the reservoir."""


_IDLE_AFTER_S: Final = 1.0
_LOOK_S: Final = 0.1
"""How long a rest goes on, at most, until it is seen that there is more time now."""


class CandidateProgress:
    """Counts, waits while paused, and rests so that no more than a share of a core is used.

    Args:
        cpu_share: of one core, while no layer is shown.
        serving_cpu_share: while there are any.
    """

    def __init__(self, cpu_share: float, serving_cpu_share: float) -> None:
        self._cpu_share = cpu_share
        self._serving_cpu_share = serving_cpu_share
        self._shown_s = time.perf_counter()
        self._going_on = threading.Event()
        self._going_on.set()
        self._used_s = 0.0
        self.num_tokens = 0
        self.epochs = 0

    def shown(self) -> None:
        """Something is served; from another thread."""
        self._shown_s = time.perf_counter()

    def pause(self, is_paused: bool) -> None:
        """From another thread."""
        if is_paused:
            self._going_on.clear()
        else:
            self._going_on.set()

    def advance(self, epoch: int, num_tokens: int) -> None:
        """See FitProgress."""
        self.num_tokens += num_tokens
        used_s = time.thread_time()
        self._rest(used_s - self._used_s)
        self._used_s = used_s
        self._going_on.wait()

    def finish_epoch(self, epoch: int, measured: "Measured") -> None:
        """See FitProgress."""
        self.epochs += 1

    def _rest(self, used_s: float) -> None:
        begin_s = time.perf_counter()
        while True:
            is_serving = time.perf_counter() - self._shown_s < _IDLE_AFTER_S
            share = self._serving_cpu_share if is_serving else self._cpu_share
            left_s = used_s * (1 / share - 1) - (time.perf_counter() - begin_s)
            if left_s <= 0:
                return
            time.sleep(min(left_s, _LOOK_S))


class CandidateThread:
    """One training.

    Args:
        config: its bounds.
        spec, pack: the model and its folder.
        out: folder for the artifact.
        told: is given what it came to, from the thread.
    """

    def __init__(
        self,
        config: LearnerConfig,
        spec: ModelSpec,
        pack: Path,
        out: Path,
        told: Callable[[CandidateTrained | TrainingFailed], None],
    ) -> None:
        self._config = config
        self._spec = spec
        self._pack = pack
        self._out = out
        self._told = told
        self.progress = CandidateProgress(config.cpu_share, config.serving_cpu_share)
        self._thread: threading.Thread | None = None
        self._is_over = False

    @property
    def is_training(self) -> bool:
        """It has not come to anything yet."""
        return self._thread is not None and not self._is_over

    def start(self, order: Train, documents: list[Document]) -> None:
        """Begins, with these documents."""
        assert self._thread is None, "a thread trains once"
        self._thread = threading.Thread(target=self._run, args=(order, documents), name="train", daemon=True)
        self._thread.start()

    def _run(self, order: Train, documents: list[Document]) -> None:
        if self._config.niceness == NICEST:
            _step_back()
        result: CandidateTrained | TrainingFailed
        try:
            result = self._train(order, documents)
        except PromoeError as error:
            result = TrainingFailed(str(error))
        except OSError as error:
            result = TrainingFailed(f"The candidate {order.name} cannot be written to {self._out} ({error.strerror}).")
        except MemoryError:
            result = TrainingFailed("There is not enough memory to train.")
        except Exception as error:  # the edge of the thread: who waits for it must be told
            logger.error("Training %s failed.", order.name, exc_info=error)
            result = TrainingFailed(f"Training {order.name} failed ({type(error).__name__}); the log has the details.")
        # Whoever is told may ask for the next one at once.
        self._is_over = True
        self._told(result)

    def _train(self, order: Train, documents: list[Document]) -> CandidateTrained:
        name = VersionName.parse(order.name)
        if not documents:
            raise InvalidInput(
                "No documents with hidden states and routings are held: the learner learns under versions that "
                "observe both."
            )
        from predictor_service.training.candidate import CandidateOrder, train_candidate

        config = self._config
        candidate = CandidateOrder(
            base=order.base,
            name=name.name,
            version=name.version,
            max_steps=config.max_steps,
            max_s=config.max_train_s,
            learning_rate=config.learning_rate,
            data={
                "documents": len(documents),
                "tokens": sum(len(document.tokens) for document in documents),
                "held_out_share": config.held_out_share,
                SOURCE_KEY: SERVED_TRAFFIC,
            },
        )

        def blocks_of(observed: ObservedKind) -> DocumentBlocks:
            return DocumentBlocks.of(documents, observed, config.held_out_share, BLOCK_NBYTES)

        path, metrics = train_candidate(candidate, self._spec, self._pack, blocks_of, self._out, self.progress)
        return CandidateTrained(str(path), metrics)


def _step_back() -> None:
    """This thread alone: what is shown has to be read. Who is woken beside a thread that is only niced waits for the
    end of its time slice.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:
        logger.info("The scheduler's idle class cannot be had (%s): training is niced down only.", error.strerror)
