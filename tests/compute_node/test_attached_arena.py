"""Blobs become readable when they are published and registered, and stop before their bytes may change."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node import arena_mapping
from compute_node.arena_mapping import ArenaGeometry
from compute_node.attached_arena import AttachedArena
from compute_node.blob_addresses import BlobAddresses, BlobPlace
from promoe.errors import InvalidInput, Unavailable
from promoe.ids import ExpertId
from tests.compute_node.test_arena_mapping import UUID, geometry_of, make_arena
from tests.node_doubles import RecordingListener, RecordingPinning

NUM_LAYERS, NUM_EXPERTS = 2, 3
GEOMETRY = geometry_of(NUM_LAYERS * NUM_EXPERTS, 4096)
EXPERTS = [ExpertId(*divmod(index, NUM_EXPERTS)) for index in range(NUM_LAYERS * NUM_EXPERTS)]


def place_of(expert: ExpertId, generation: int = 1) -> BlobPlace:
    return BlobPlace(expert, 8192 + EXPERTS.index(expert) * 4096, generation)


@pytest.fixture
def listener() -> RecordingListener:
    return RecordingListener()


@pytest.fixture
def pinning() -> RecordingPinning:
    return RecordingPinning()


@pytest.fixture
def arena(
    listener: RecordingListener, pinning: RecordingPinning, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AttachedArena]:
    """Chunks of two blobs."""
    monkeypatch.setattr(arena_mapping, "_CHUNK_NBYTES", 2 * 4096)
    attached = AttachedArena("model", NUM_LAYERS, NUM_EXPERTS, pinning, listener)
    attached.map(make_arena(GEOMETRY), GEOMETRY)
    yield attached
    attached.close()
    assert pinning.registered == {}


def readable(arena: AttachedArena) -> list[ExpertId]:
    missing = arena.addresses.missing()
    assert arena.addresses.num_readable == len(EXPERTS) - len(missing)
    return [expert for expert in EXPERTS if expert not in missing]


def test_a_blob_is_readable_when_its_chunk_is_whole(
    arena: AttachedArena, listener: RecordingListener, pinning: RecordingPinning
) -> None:
    arena.take_table(GEOMETRY, [place_of(EXPERTS[1])], complete=False)
    assert readable(arena) == []
    assert arena.num_known == 1
    with pytest.raises(Unavailable, match="L0E1"):
        arena.addresses.address_of(EXPERTS[1])
    arena.take_blobs([place_of(EXPERTS[0]), place_of(EXPERTS[2])], complete=False)
    assert readable(arena) == EXPERTS[:2]
    assert arena.num_known == 3
    arena.take_blobs([place_of(expert) for expert in EXPERTS[3:]], complete=True)
    assert readable(arena) == EXPERTS
    assert sorted(listener.events) == [("published", expert) for expert in EXPERTS]
    for expert in EXPERTS:
        assert pinning.covers(arena.addresses.address_of(expert), 4096)


def test_a_fill_that_ends_without_a_blob_exposes_the_others(arena: AttachedArena) -> None:
    arena.take_table(GEOMETRY, [place_of(expert) for expert in EXPERTS if expert != EXPERTS[3]], complete=True)
    assert readable(arena) == [expert for expert in EXPERTS if expert != EXPERTS[3]]
    arena.take_blobs([place_of(EXPERTS[3], generation=2)], complete=True)
    assert readable(arena) == EXPERTS


def test_a_withdrawn_blob_is_gone_before_its_readers_are_told(
    arena: AttachedArena, listener: RecordingListener
) -> None:
    arena.take_table(GEOMETRY, [place_of(expert) for expert in EXPERTS], complete=True)
    address = arena.addresses.address_of(EXPERTS[4])
    arena.withdraw(EXPERTS[4])
    arena.withdraw(EXPERTS[4])
    assert listener.events.count(("retired", EXPERTS[4])) == 1
    with pytest.raises(Unavailable, match="withdrawn L1E1"):
        arena.addresses.address_of(EXPERTS[4])
    arena.take_blobs([place_of(EXPERTS[4], generation=2)], complete=True)
    assert arena.addresses.address_of(EXPERTS[4]) == address


def test_a_blob_that_is_withdrawn_before_its_chunk_was_whole_is_not_exposed(arena: AttachedArena) -> None:
    arena.take_table(GEOMETRY, [place_of(EXPERTS[0])], complete=False)
    arena.withdraw(EXPERTS[0])
    arena.take_blobs([place_of(EXPERTS[1])], complete=False)
    assert readable(arena) == []


def test_a_table_after_a_restart_keeps_what_is_the_same(arena: AttachedArena, listener: RecordingListener) -> None:
    arena.take_table(GEOMETRY, [place_of(expert) for expert in EXPERTS], complete=True)
    addresses = [arena.addresses.address_of(expert) for expert in EXPERTS]
    before = len(listener.events)
    arena.take_table(GEOMETRY, [place_of(expert) for expert in EXPERTS], complete=True)
    assert [arena.addresses.address_of(expert) for expert in EXPERTS] == addresses
    assert len(listener.events) == before
    changed = [place_of(EXPERTS[0], generation=2), *(place_of(expert) for expert in EXPERTS[2:])]
    arena.take_table(GEOMETRY, changed, complete=True)
    assert [event for event in listener.events[before:] if event[0] != "retiring"] == [
        ("retired", EXPERTS[0]),
        ("retired", EXPERTS[1]),
        ("published", EXPERTS[0]),
    ]
    assert readable(arena) == [EXPERTS[0], *EXPERTS[2:]]


def test_another_arena_is_mapped_only_after_this_one_was_let_go(
    arena: AttachedArena, listener: RecordingListener, pinning: RecordingPinning
) -> None:
    arena.take_table(GEOMETRY, [place_of(expert) for expert in EXPERTS], complete=True)
    held = arena.held
    assert held is not None
    assert held.uuid == UUID
    fd = make_arena(GEOMETRY)
    with pytest.raises(AssertionError, match="never two arenas at once"):
        arena.map(fd, GEOMETRY)
    arena.let_go("the test says so")
    assert arena.held is None
    assert pinning.registered == {}
    assert [expert for event, expert in listener.events if event == "retired"] == EXPERTS
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held.fd)
    arena.map(fd, GEOMETRY)
    arena.take_table(GEOMETRY, [place_of(expert) for expert in EXPERTS], complete=True)
    assert readable(arena) == EXPERTS
    arena.let_go("again")
    arena.let_go("letting go of nothing is nothing")


def test_the_table_of_another_arena_is_not_applied(arena: AttachedArena) -> None:
    other = ArenaGeometry("f" * 32, "memfd", GEOMETRY.nbytes, GEOMETRY.data_offset, GEOMETRY.blob_stride_nbytes)
    with pytest.raises(Unavailable, match="changed its arena"):
        arena.take_table(other, [], complete=True)


@pytest.mark.parametrize("expert", [ExpertId(2, 0), ExpertId(0, 3)])
def test_an_expert_that_the_model_lacks_is_refused(expert: ExpertId, arena: AttachedArena) -> None:
    with pytest.raises(InvalidInput, match=f"speaks of {expert}"):
        arena.take_table(GEOMETRY, [BlobPlace(expert, 8192, 1)], complete=True)


@pytest.mark.parametrize("offset", [0, GEOMETRY.data_offset + 1, GEOMETRY.nbytes, 1 << 62])
def test_a_blob_outside_its_place_is_refused_before_anybody_reads_there(offset: int, arena: AttachedArena) -> None:
    with pytest.raises(InvalidInput, match=f"speaks of a blob at byte {offset}; its arena has no place there"):
        arena.take_table(GEOMETRY, [BlobPlace(ExpertId(0, 0), offset, 1)], complete=True)
    assert readable(arena) == []


class OracleListener:
    """Checks each call against the addresses: readable after publishing, gone before retiring."""

    def __init__(self) -> None:
        self.addresses: BlobAddresses | None = None

    def blob_retired(self, expert: ExpertId) -> None:
        assert self.addresses is not None
        with pytest.raises(Unavailable):
            self.addresses.address_of(expert)

    def blob_published(self, expert: ExpertId) -> None:
        assert self.addresses is not None
        assert self.addresses.address_of(expert) > 0


@given(
    st.lists(st.tuples(st.sampled_from(["expose", "withdraw", "table"]), st.sampled_from(EXPERTS), st.integers(1, 3)))
)
def test_addresses_follow_the_last_word(steps: list[tuple[str, ExpertId, int]]) -> None:
    listener = OracleListener()
    addresses = BlobAddresses(NUM_LAYERS, NUM_EXPERTS, listener)
    listener.addresses = addresses
    oracle: dict[ExpertId, int] = {}
    for step, expert, generation in steps:
        if step == "expose":
            addresses.expose(place_of(expert, generation), 4096 * generation)
            oracle[expert] = generation
        elif step == "withdraw":
            addresses.withdraw(expert)
            oracle.pop(expert, None)
        else:
            addresses.withdraw_others([place_of(expert, generation)])
            oracle = {e: g for e, g in oracle.items() if (e, g) == (expert, generation)}
        assert addresses.num_readable == len(oracle)
        assert set(addresses.missing()) == set(EXPERTS) - set(oracle)
        for readable_expert, readable_generation in oracle.items():
            assert addresses.address_of(readable_expert) == 4096 * readable_generation
    addresses.withdraw_all()
    assert addresses.missing() == EXPERTS
