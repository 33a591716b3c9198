"""No byte of a blob changes while a node may read it: the table against a model of what each node may read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from expert_store.arena import ArenaLayout
from expert_store.blob_table import BlobsAdded, BlobState, BlobTable, BlobWithdrawn, Lease, StoreEvent, TableSent
from expert_store.directory import ENTRY_NBYTES, Directory
from promoe.errors import InvalidInput
from promoe.ids import ExpertId

LAYOUT = ArenaLayout("f", 2, 3, 4096, 4096)
CHECKSUMS = [1000 + index for index in range(LAYOUT.num_blobs)]
INDICES = st.integers(0, LAYOUT.num_blobs - 1)


class Node:
    """What a compute node knows, from the events it was sent; it acknowledges when the test says so."""

    def __init__(self, name: str) -> None:
        self.readable: dict[ExpertId, int] = {}
        self.to_acknowledge: dict[ExpertId, int] = {}
        self.complete = False
        self.lease = Lease(name, 1, 1, self.receive)

    def receive(self, event: StoreEvent) -> None:
        match event:
            case TableSent():
                listed = {blob.expert: blob.generation for blob in event.blobs}
                self.readable = listed
                self.complete = event.complete
            case BlobsAdded():
                self.readable |= {blob.expert: blob.generation for blob in event.blobs}
                self.complete = event.complete
            case BlobWithdrawn():
                self.readable.pop(event.expert, None)
                self.to_acknowledge[event.expert] = event.generation

    def may_read(self, index: int) -> bool:
        expert = LAYOUT.expert_at(index)
        return expert in self.readable or expert in self.to_acknowledge


class TableMachine(RuleBasedStateMachine):
    """Nodes come, go and acknowledge in any order while blobs are published and withdrawn."""

    nodes = Bundle("nodes")

    @initialize()
    def start(self) -> None:
        self.memory = bytearray(LAYOUT.num_blobs * ENTRY_NBYTES)
        self.table = BlobTable(LAYOUT, Directory(memoryview(self.memory)), CHECKSUMS)
        self.attached: dict[str, Node] = {}
        self.reusable: set[int] = set()
        self.num_names = 0

    @rule(target=nodes)
    def attach(self) -> Node:
        self.num_names += 1
        node = Node(f"node {self.num_names}")
        self.attached[node.lease.node_instance_id] = node
        self.table.attach(node.lease, knows_arena=False)
        return node

    @rule(node=nodes)
    def come_back(self, node: Node) -> None:
        """The stream broke and the node attached again before the store noticed; it still reads what it read."""
        pending = {LAYOUT.index_of(expert) for expert in node.to_acknowledge}
        node.to_acknowledge.clear()
        node.lease = Lease(node.lease.node_instance_id, 1, 1, node.receive)
        self.attached[node.lease.node_instance_id] = node
        self.table.attach(node.lease, knows_arena=True)
        assert {LAYOUT.index_of(expert) for expert in node.to_acknowledge} == set(self.table.indices(BlobState.RETIRED))
        assert pending <= set(self.table.indices(BlobState.RETIRED)), "given up while the node might still read it"

    @rule(node=consumes(nodes))
    def leave(self, node: Node) -> None:
        self.attached.pop(node.lease.node_instance_id, None)
        node.readable.clear()
        node.to_acknowledge.clear()
        self.table.drop(node.lease)

    @rule(indices=st.sets(INDICES))
    def publish(self, indices: set[int]) -> None:
        writable = {*self.table.indices(BlobState.EMPTY), *self.table.indices(BlobState.REUSABLE)}
        chosen = sorted(indices & writable)
        for index in chosen:
            assert not any(node.may_read(index) for node in self.attached.values()), "written under a reader"
        self.table.publish(chosen)
        self.reusable -= set(chosen)

    @rule(index=INDICES)
    def retire(self, index: int) -> None:
        if index in self.table.indices(BlobState.PUBLISHED):
            self.table.retire(index, "It is damaged.")
            self.table.when_reusable(index, lambda: self.reusable.add(index))

    @rule(node=nodes, stale=st.booleans())
    def acknowledge(self, node: Node, stale: bool) -> None:
        if node.to_acknowledge:
            expert, generation = next(iter(node.to_acknowledge.items()))
            if stale:
                self.table.acknowledge(node.lease, expert, generation + 1)
            else:
                del node.to_acknowledge[expert]
                self.table.acknowledge(node.lease, expert, generation)

    @invariant()
    def table_is_whole(self) -> None:
        self.table.check_integrity()
        assert self.reusable == set(self.table.indices(BlobState.REUSABLE))
        assert [lease.node_instance_id for lease in self.table.leases] == list(self.attached)

    @invariant()
    def nodes_read_published_blobs_only(self) -> None:
        published = {LAYOUT.expert_at(index) for index in self.table.indices(BlobState.PUBLISHED)}
        for node in self.attached.values():
            assert set(node.readable) == published
            assert node.complete == self.table.is_complete
            waiting = {LAYOUT.index_of(expert) for expert in node.to_acknowledge}
            assert waiting <= set(self.table.indices(BlobState.RETIRED))

    @invariant()
    def a_restarted_store_sees_the_same_blobs_and_writes_under_nobody(self) -> None:
        successor = BlobTable(LAYOUT, Directory(memoryview(bytearray(self.memory))), CHECKSUMS)
        successor.check_integrity()
        assert successor.indices(BlobState.PUBLISHED) == self.table.indices(BlobState.PUBLISHED)
        for index in successor.indices(BlobState.EMPTY):
            assert not any(node.may_read(index) for node in self.attached.values())


TestTable = TableMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def new_table(checksums: list[int] = CHECKSUMS, memory: bytearray | None = None) -> BlobTable:
    memory = bytearray(LAYOUT.num_blobs * ENTRY_NBYTES) if memory is None else memory
    return BlobTable(LAYOUT, Directory(memoryview(memory)), checksums)


def test_a_blob_that_the_pack_does_not_have_is_withdrawn_from_who_reads_it() -> None:
    memory = bytearray(LAYOUT.num_blobs * ENTRY_NBYTES)
    new_table(memory=memory).publish([0, 1])
    successor = new_table([0, *CHECKSUMS[1:]], memory)
    assert successor.indices(BlobState.PUBLISHED) == [1]
    assert successor.indices(BlobState.RETIRED) == [0]


@given(st.integers(0, 19), st.integers(0, 7), st.booleans())
def test_after_a_torn_entry_a_node_is_told_and_the_generation_is_a_new_one(byte: int, bit: int, retire: bool) -> None:
    memory = bytearray(LAYOUT.num_blobs * ENTRY_NBYTES)
    former = new_table(memory=memory)
    former.publish([0, 1])
    if retire:
        former.retire(0, "It is damaged.")
    memory[byte] ^= 1 << bit
    table = new_table(memory=memory)
    table.expect("node", 5)
    table.check_integrity()
    assert table.indices(BlobState.RETIRED) == [0]
    reusable: list[int] = []
    table.when_reusable(0, lambda: reusable.append(0))
    assert reusable == []
    node = Node("node")
    table.attach(node.lease, knows_arena=True)
    assert set(node.readable) == {ExpertId(0, 1)}
    table.acknowledge(node.lease, ExpertId(0, 0), node.to_acknowledge.pop(ExpertId(0, 0)))
    assert reusable == [0]
    table.publish([0])
    assert node.readable[ExpertId(0, 0)] > 1
    table.check_integrity()


def test_a_withdrawn_blob_stays_withdrawn_over_a_restart_and_counts_on() -> None:
    memory = bytearray(LAYOUT.num_blobs * ENTRY_NBYTES)
    former = new_table(memory=memory)
    former.publish([0])
    former.retire(0, "It is damaged.")
    table = new_table(memory=memory)
    called: list[int] = []
    table.when_reusable(0, lambda: called.append(0))
    assert called == [0], "nobody is expected"
    table.publish([0])
    node = Node("node")
    table.attach(node.lease, knows_arena=False)
    assert node.readable == {ExpertId(0, 0): 2}


def test_an_expected_node_keeps_a_withdrawn_blob_until_it_has_come_back_and_acknowledged() -> None:
    table = new_table()
    table.publish([0, 1])
    table.expect("node", 5)
    reusable: list[int] = []
    table.retire(0, "It is damaged.")
    table.when_reusable(0, lambda: reusable.append(0))
    assert reusable == []
    node = Node("node")
    table.attach(node.lease, knows_arena=True)
    assert reusable == []
    table.acknowledge(node.lease, ExpertId(0, 0), 1)
    assert reusable == [0]
    assert table.drop_absent() == []


def test_an_expected_node_that_never_comes_back_is_given_up() -> None:
    table = new_table()
    table.publish([0])
    table.expect("node", 5)
    reusable: list[int] = []
    table.retire(0, "It is damaged.")
    table.when_reusable(0, lambda: reusable.append(0))
    assert [lease.pid for lease in table.drop_absent()] == [5]
    assert reusable == [0]
    assert table.leases == []


def test_an_acknowledgement_for_an_expert_that_does_not_exist_is_refused() -> None:
    table = new_table()
    node = Node("node")
    table.attach(node.lease, knows_arena=False)
    with pytest.raises(InvalidInput, match="L9E0"):
        table.acknowledge(node.lease, ExpertId(9, 0), 1)


def test_a_replaced_lease_does_not_end_its_successor() -> None:
    table = new_table()
    first, second = Node("node"), Node("node")
    table.attach(first.lease, knows_arena=False)
    table.attach(second.lease, knows_arena=True)
    table.drop(first.lease)
    assert table.leases == [second.lease]
    table.publish([3])
    assert second.readable == {ExpertId(1, 0): 1}
    assert first.readable == {}
