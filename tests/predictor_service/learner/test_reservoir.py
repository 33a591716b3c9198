"""The reservoir keeps its bound, and a sample in which what is older is rarer, as the half-life says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.learner.document import Document, SeenToken
from predictor_service.learner.reservoir import DocumentBlocks, Reservoir
from predictor_service.training.token_blocks import Split
from promoe.hint import ObservedKind


def document(name: str, tokens: int = 3, observed: ObservedKind = ObservedKind.ROUTER_INPUT) -> Document:
    made = Document(name, observed)
    for _ in range(tokens):
        ids_LK, seen_S = np.zeros((2, 1), np.uint16), np.ones(2, np.bool_)
        made.add(SeenToken(np.zeros((2, 4), np.uint16), seen_S, ids_LK, is_decode=True, follows=bool(made.tokens)))
    return made


NBYTES = document("x").nbytes


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0, 1e6)), max_size=40), st.integers(0, 20 * NBYTES))
def test_the_bound_holds_whatever_comes(arrivals: list[tuple[int, float]], max_nbytes: int) -> None:
    reservoir = Reservoir(max_nbytes, half_life_s=100.0)
    held = 0
    for number, (tokens, now_s) in enumerate(sorted(arrivals, key=lambda arrival: arrival[1])):
        given_up = reservoir.add(document(str(number), tokens), now_s)
        held += 1 - len(given_up)
        reservoir.check_integrity()
        assert len(reservoir) == held
    assert reservoir.num_seen == len(arrivals)
    names = [held_document.name for held_document in reservoir.documents()]
    assert names == sorted(names, key=int), "oldest first"
    reservoir.make_room(max_nbytes)
    assert reservoir.nbytes == 0


def test_without_an_age_every_document_is_as_likely() -> None:
    kept = np.zeros(40)
    for seed in range(300):
        reservoir = Reservoir(10 * NBYTES, half_life_s=100.0, seed=seed)
        for number in range(40):
            reservoir.add(document(str(number)), 0.0)
        for held in reservoir.documents():
            kept[int(held.name)] += 1
    assert kept.sum() == 3000
    assert kept.min() > 75 - 45
    assert kept.max() < 75 + 45


def test_what_is_a_half_life_older_is_half_as_likely() -> None:
    """One place for two documents: the older one has it in a third of all cases."""
    old = 0
    for seed in range(2000):
        reservoir = Reservoir(NBYTES, half_life_s=60.0, seed=seed)
        reservoir.add(document("old"), 1000.0)
        reservoir.add(document("new"), 1060.0)
        old += reservoir.documents()[0].name == "old"
    assert old / 2000 == pytest.approx(1 / 3, abs=0.04)


def test_after_many_half_lives_nothing_is_left_of_the_old_text() -> None:
    reservoir = Reservoir(20 * NBYTES, half_life_s=10.0)
    for number in range(200):
        reservoir.add(document(f"{number}"), float(number))
    assert min(int(held.name) for held in reservoir.documents()) > 100
    assert reservoir.oldest_age_s(200.0) < 100.0
    assert reservoir.num_tokens() == 60
    assert Reservoir(1, 1.0).oldest_age_s(5.0) == 0.0


def test_a_document_is_on_one_side_for_ever() -> None:
    documents = [document(f"s:{number}") for number in range(200)]
    blocks = DocumentBlocks.of(documents, ObservedKind.ROUTER_INPUT, 0.3, 1)
    sizes = {split: sum(len(block.document_N) for block in blocks(split)) // 3 for split in Split}
    assert sum(sizes.values()) == 200
    assert 40 < sizes[Split.HELD_OUT] < 80
    fewer = DocumentBlocks.of(documents[::2], ObservedKind.ROUTER_INPUT, 0.3, 1)
    assert sum(len(block.document_N) for block in fewer(Split.HELD_OUT)) // 3 <= sizes[Split.HELD_OUT]


def test_documents_of_other_hidden_states_are_left_out() -> None:
    documents = [document("a", observed=ObservedKind.LAYER_INPUT), document("b")]
    assert DocumentBlocks.of(documents, ObservedKind.ROUTER_INPUT, 0.3, 1).documents == (documents[1],)
