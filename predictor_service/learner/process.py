"""The learner's process: reads the feed, holds documents, trains when told to, ends with who started it.

Everything but training happens on one thread, a packet or a command at a time.
"""

import logging
import os
import selectors
import time
from pathlib import Path
from typing import Final

from predictor_service.learner import feed_client
from predictor_service.learner.candidate_thread import CandidateThread
from predictor_service.learner.config import LearnerConfig
from predictor_service.learner.control import (
    AskStatus,
    CandidateTrained,
    Command,
    ControlLines,
    KnowVersions,
    LearnerStatus,
    Pause,
    Train,
    TrainingFailed,
    decode_command,
    encode_answer,
)
from predictor_service.learner.document import Document
from predictor_service.learner.feed_pace import FeedPace
from predictor_service.learner.gatherer import Gatherer
from predictor_service.learner.kept_documents import KeptDocuments
from predictor_service.learner.reservoir import Reservoir
from promoe.errors import InvalidInput, Unavailable
from promoe.model_spec import ModelSpec
from promoe.packet_channel import PacketChannel

logger = logging.getLogger(__name__)

_MOST_PACKETS_A_TURN: Final = 256
"""That are read before commands are looked at again."""

_SWEEP_EVERY_S: Final = 60.0
"""Documents on the disk get too old also while none come."""


class LearnerProcess:
    """Runs until the control line ends.

    Args:
        config: bounds.
        spec, pack: the model that is served and its folder.
        out: folder for candidates.
        feed: packets of the sessions.
        control: commands and answers.
    """

    def __init__(
        self,
        config: LearnerConfig,
        spec: ModelSpec,
        pack: Path,
        out: Path,
        feed: PacketChannel,
        control: ControlLines,
    ) -> None:
        self._config = config
        self._spec = spec
        self._pack = pack
        self._out = out
        self._feed = feed
        self._feed_pace = FeedPace(feed.buffer_nbytes, time.perf_counter())
        self._control = control
        self._reservoir = Reservoir(config.max_nbytes, config.half_life_s)
        self._gatherer = Gatherer(spec, config.max_document_tokens, self._hold)
        self._kept: KeptDocuments | None = None
        if config.keep_on_disk is not None:
            self._kept = KeptDocuments(config.keep_on_disk, spec, config.disk_max_nbytes, config.disk_max_age_s)
        self._sweep_at_s = time.perf_counter()
        self._candidate: CandidateThread | None = None
        self._is_paused = False
        self._num_bad_packets = 0

    def run(self) -> None:
        """Returns when the other side is gone."""
        if self._kept is not None:
            for document, age_s in self._kept.load():
                self._reservoir.add(document, time.perf_counter() - age_s)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._feed, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select(self._sweep())}
                try:
                    if self._control in ready:
                        self._obey()
                except (Unavailable, InvalidInput):  # gone, or talking without end
                    return
                if self._feed in ready and not self._read_feed():
                    selector.unregister(self._feed)

    def status(self) -> LearnerStatus:
        """As of now."""
        candidate = self._candidate
        return LearnerStatus(
            documents_seen=self._reservoir.num_seen,
            documents=len(self._reservoir),
            tokens=self._reservoir.num_tokens(),
            nbytes=self._reservoir.nbytes + self._gatherer.open_nbytes,
            oldest_age_s=self._reservoir.oldest_age_s(time.perf_counter()),
            lost_steps=self._gatherer.num_lost_steps,
            bad_packets=self._num_bad_packets,
            is_paused=self._is_paused,
            is_training=candidate is not None and candidate.is_training,
            trained_tokens=candidate.progress.num_tokens if candidate else 0,
            epochs=candidate.progress.epochs if candidate else 0,
        )

    def _sweep(self) -> float | None:
        """Removes what is too old by now; in how long that is due again, None for never."""
        if self._kept is None:
            return None
        if time.perf_counter() >= self._sweep_at_s:
            self._kept.sweep()
            self._sweep_at_s = time.perf_counter() + min(_SWEEP_EVERY_S, self._config.disk_max_age_s)
        return max(0.0, self._sweep_at_s - time.perf_counter())

    def _read_feed(self) -> bool:
        """What waits there; False when nothing will come any more."""
        num_packets = read_nbytes = 0
        try:
            while num_packets < _MOST_PACKETS_A_TURN and (packet_nbytes := self._read_packet()) is not None:
                num_packets, read_nbytes = num_packets + 1, read_nbytes + packet_nbytes
                os.sched_yield()  # whoever was woken meanwhile does not wait for the end of this turn
        except Unavailable:
            return False
        self._keep_bounds()
        if self._candidate is not None:
            self._candidate.progress.shown()
        time.sleep(self._feed_pace.rest_s(read_nbytes, time.perf_counter()))
        return True

    def _read_packet(self) -> int | None:
        """Its bytes; None when none waits. Raises Unavailable when none will come."""
        packet: bytes | None = None
        try:
            packet = self._feed.receive(0)
            if packet is not None and not self._is_paused:
                feed_client.tell(packet, self._gatherer)
        except InvalidInput:
            self._num_bad_packets += 1
            return len(packet or b"")
        return None if packet is None else len(packet)

    def _keep_bounds(self) -> None:
        """Requests that still run count, too; they go last."""
        while (open_nbytes := self._gatherer.open_nbytes) > self._config.max_nbytes and self._gatherer.close_oldest():
            pass
        self._reservoir.make_room(open_nbytes)

    def _hold(self, document: Document) -> None:
        given_up = self._reservoir.add(document, time.perf_counter())
        if self._kept is not None and document not in given_up:
            self._kept.keep(document)

    def _obey(self) -> None:
        """Raises Unavailable when the other side is gone."""
        for line in self._control.receive():
            try:
                self._obey_command(decode_command(line))
            except InvalidInput as error:
                # Both ends are of one installation: a line that is no command is a bug, and the next one may be good.
                logger.error("%s", error)

    def _obey_command(self, command: Command) -> None:
        match command:
            case Train():
                self._train(command)
            case Pause():
                self._is_paused = command.is_paused
                if self._candidate is not None:
                    self._candidate.progress.pause(command.is_paused)
            case AskStatus():
                self._control.send(encode_answer(self.status()))
            case KnowVersions():
                for version, observed in command.observed.items():
                    self._gatherer.learn_version(version, observed)

    def _train(self, command: Train) -> None:
        if self._candidate is not None and self._candidate.is_training:
            self._tell(TrainingFailed("A candidate is being trained already."))
            return
        self._candidate = CandidateThread(self._config, self._spec, self._pack, self._out, self._tell)
        self._candidate.progress.pause(self._is_paused)
        self._candidate.start(command, self._reservoir.documents())

    def _tell(self, answer: CandidateTrained | TrainingFailed) -> None:
        """From the candidate's thread, too."""
        try:
            self._control.send(encode_answer(answer))
        except Unavailable:  # nobody waits for it any more; the process ends
            return
