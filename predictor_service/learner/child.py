"""Starts the learner's process and holds its two sockets. Knows nothing of what is decided."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from predictor_service.learner.control import Answer, Command, ControlLines, decode_answer, encode_command
from promoe.packet_channel import PacketChannel

_END_S: Final = 5.0


class LearnerChild:
    """A running learner.

    Args:
        settings: arguments as the service itself has them: `--config`, `--set`.
        out: folder for candidates.

    Attributes:
        process: for waiting and killing.
        feed: takes the sessions' packets; sending never waits.
        control: commands and answers.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, settings: Sequence[str], out: Path) -> None:
        feed, feed_of_child = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, control_of_child = socket.socketpair()
        with feed_of_child, control_of_child:
            fds = (feed_of_child.fileno(), control_of_child.fileno())
            command = [sys.executable, "-P", "-m", "predictor_service.learner", *settings, "--out", os.fspath(out)]
            try:
                self.process = subprocess.Popen(
                    [*command, "--feed-fd", str(fds[0]), "--control-fd", str(fds[1])],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                )
            except OSError:
                feed.close()
                control.close()
                raise
        self.feed = PacketChannel(feed)
        self.control = ControlLines(control)

    def send(self, command: Command) -> None:
        """Raises Unavailable when it is gone."""
        self.control.send(encode_command(command))

    def answers(self) -> Iterator[Answer]:
        """Waits for something and yields what it said; raises Unavailable when it is gone."""
        for line in self.control.receive():
            yield decode_answer(line)

    def close(self) -> None:
        """Ends it: it goes when its control line ends, and is killed where it does not."""
        # Closing alone would not tell it: while a thread waits here for an answer, the connection stays open.
        self.control.shut_down()
        self.feed.shut_down()
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.feed.close()
        self.control.close()
