"""A session over packets, as the engine thread holds it: it waits for nobody, and what is not sent is counted."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from compute_node.device.seam import HostCopy
from compute_node.layer_sample import LayerSample
from compute_node.outgoing import QUEUE_CAPACITY, OutgoingEvent
from compute_node.packet_carrier import (
    MOST_ENDS_A_MESSAGE,
    MOST_ENDS_UNTOLD,
    MOST_MESSAGES_A_LOOK,
    PacketCarrier,
)
from promoe.errors import InvalidInput, Overloaded, PromoeError, Unavailable
from promoe.hint import ObservedKind, RequestsEnded, StepStart
from promoe.packet_channel import PacketChannel


class LateCopy:
    """A copy to the host that ends when the test says so."""

    done = False

    def is_done(self) -> bool:
        return self.done

    def wait_on_host(self) -> None:
        raise AssertionError("the engine thread waits for no copy")

    def wait_on_compute(self) -> None:
        raise AssertionError("nobody computes with it")


def text_of(event: OutgoingEvent) -> bytes:
    if isinstance(event, LayerSample):
        return f"layer {event.step}.{event.layer}".encode()
    if isinstance(event, StepStart):
        return f"step {event.step}".encode()
    return f"ended {','.join(event.request_ids)}".encode()


def sample(step: int, layer: int, copy: LateCopy | None = None) -> LayerSample:
    hidden = None if copy is None else HostCopy(torch.zeros(1), copy)
    return LayerSample(step, layer, ObservedKind.NONE, (0,), 1, hidden, ())


@dataclass
class Talk:
    """A carrier, the service's end, and what the carrier received."""

    carrier: PacketCarrier
    service: PacketChannel
    received: list[bytes] = field(default_factory=list)
    refuse: Callable[[bytes], None] = lambda message: None

    def take(self, message: bytes) -> None:
        self.refuse(message)
        self.received.append(message)

    def came(self) -> list[str]:
        """At the service, so far."""
        return [message.decode() for message in iter(lambda: self.service.receive(0), None)]


@pytest.fixture
def talk() -> Iterator[Talk]:
    here, there = (PacketChannel(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    opened = Talk(PacketCarrier(here, text_of, lambda message: opened.take(message)), there)
    yield opened
    opened.carrier.finish()
    there.close()


def refusing(error: PromoeError) -> Callable[[bytes], None]:
    def refuse(message: bytes) -> None:
        raise error

    return refuse


def test_events_go_out_at_once_and_in_their_order(talk: Talk) -> None:
    for event in (StepStart(1, ()), sample(1, 0), sample(1, 1), RequestsEnded(("a", "b")), StepStart(2, ())):
        talk.carrier.send(event)
    assert talk.came() == ["step 1", "layer 1.0", "layer 1.1", "ended a,b", "step 2"]
    assert (talk.carrier.num_sent, talk.carrier.num_dropped) == (2, 0)


def test_hidden_states_on_their_way_hold_up_what_comes_after_them_and_nobody_else(talk: Talk) -> None:
    copy = LateCopy()
    for event in (StepStart(1, ()), sample(1, 0, copy), sample(1, 1)):
        talk.carrier.send(event)
    talk.carrier.look()
    assert talk.came() == ["step 1"]
    copy.done = True
    talk.carrier.look()
    assert talk.came() == ["layer 1.0", "layer 1.1"]


def test_hidden_states_that_never_come_are_dropped_and_steps_are_told(talk: Talk) -> None:
    talk.carrier.send(StepStart(1, ()))
    talk.carrier.send(sample(1, 0, LateCopy()))
    talk.carrier.send(StepStart(2, ()))
    for number in range(QUEUE_CAPACITY):
        talk.carrier.send(sample(2, number))
    assert talk.carrier.num_dropped == 1
    assert talk.came()[:3] == ["step 1", "step 2", "layer 2.0"]


def test_what_has_no_room_is_dropped_with_its_step_and_an_end_is_told_later(talk: Talk) -> None:
    step = 0
    while talk.carrier.num_dropped < 10:
        step += 1
        talk.carrier.send(RequestsEnded((f"r{step}",)))
        talk.carrier.send(StepStart(step, ()))
        for layer in range(3):
            talk.carrier.send(sample(step, layer))
    assert talk.carrier.num_sent + talk.carrier.num_dropped == 3 * step
    came = talk.came()
    talk.carrier.send(StepStart(step + 1, ()))
    came += talk.came()
    told = [request for message in came if message.startswith("ended") for request in message[6:].split(",")]
    assert told == [f"r{number}" for number in range(1, step + 1)]
    begun = {message[5:] for message in came if message.startswith("step")}
    assert {message[6:].split(".")[0] for message in came if message.startswith("layer")} <= begun


def test_ends_are_told_while_no_step_is_shown_and_many_of_them_in_parts(talk: Talk) -> None:
    """While hardly any expert is missed no step is shown, for days perhaps: what is kept for one would only grow."""
    talk.carrier.send(RequestsEnded(("a",)))
    talk.carrier.send(RequestsEnded(("b",)))
    assert talk.came() == ["ended a", "ended b"]
    talk.carrier.send(RequestsEnded(tuple(map(str, range(MOST_ENDS_A_MESSAGE + 1)))))
    assert [message.count(",") + 1 for message in talk.came()] == [MOST_ENDS_A_MESSAGE, 1]


def test_a_service_that_cannot_be_told_of_ends_is_given_up_before_they_fill_the_memory(talk: Talk) -> None:
    ids = tuple(f"request-{number}" for number in range(MOST_ENDS_A_MESSAGE))
    for _ in range(2 * MOST_ENDS_UNTOLD // MOST_ENDS_A_MESSAGE + 500):
        talk.carrier.send(RequestsEnded(ids))
    assert len(talk.carrier._ended_ids) == 0
    assert "could not be told" in str(talk.carrier.finish())


def test_what_has_come_to_the_host_since_goes_out_when_asked_without_looking(talk: Talk) -> None:
    copy = LateCopy()
    for event in (StepStart(1, ()), sample(1, 0, copy)):
        talk.carrier.send(event)
    talk.carrier.flush()
    assert talk.came() == ["step 1"]
    copy.done = True
    talk.carrier.flush()
    assert talk.came() == ["layer 1.0"]


def test_one_look_takes_a_bounded_number_of_messages(talk: Talk) -> None:
    for number in range(MOST_MESSAGES_A_LOOK + 5):
        assert talk.service.send(b"%d" % number)
    talk.carrier.look()
    assert len(talk.received) == MOST_MESSAGES_A_LOOK
    talk.carrier.look()
    assert talk.received == [b"%d" % number for number in range(MOST_MESSAGES_A_LOOK + 5)]


def test_a_service_that_goes_costs_the_engine_nothing_and_its_last_words_are_heard(talk: Talk) -> None:
    talk.carrier.send(StepStart(1, ()))
    talk.service.send(b"last words")
    talk.service.close()
    for layer in range(3):
        talk.carrier.send(sample(1, layer))
        talk.carrier.look()
    assert talk.carrier.num_dropped == 3
    assert isinstance(talk.carrier.finish(), Unavailable)
    assert talk.received == [b"last words"]
    talk.carrier.send(sample(1, 3))
    talk.carrier.look()
    assert talk.carrier.num_dropped == 4


def test_what_ends_the_session_is_its_reason(talk: Talk) -> None:
    talk.refuse = refusing(Overloaded("too much"))
    talk.service.send(b"flood")
    talk.carrier.look()
    talk.carrier.send(StepStart(1, ()))
    assert str(talk.carrier.finish()) == "too much"
    with pytest.raises(Unavailable):
        talk.service.receive(20)


def test_the_services_own_reason_is_better_than_that_it_is_gone(talk: Talk) -> None:
    talk.refuse = refusing(InvalidInput("a step came twice"))
    talk.carrier.send(StepStart(1, ()))
    talk.service.send(b"end")
    talk.service.close()
    talk.carrier.send(StepStart(2, ()))
    assert str(talk.carrier.finish()) == "a step came twice"
