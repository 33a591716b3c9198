"""Footprints and rooms survive the way from one service to the next, and nothing else is taken for one."""

import json

import pytest

from promoe.errors import InvalidInput
from promoe.footprint import HostRoom, ModelFootprint
from tests.promoe.plans import footprint


def test_a_footprint_survives_the_way() -> None:
    sent = footprint()
    assert ModelFootprint.of_document(json.loads(json.dumps(sent.as_document()))) == sent


@pytest.mark.parametrize("document", [None, [], {}, {"spec": 3}, {**footprint().as_document(), "more": 1}])
def test_anything_else_is_refused(document: object) -> None:
    with pytest.raises(InvalidInput):
        ModelFootprint.of_document(document)


def test_a_hosts_room() -> None:
    assert HostRoom.of_document({"nbytes": 5, "limit": "free memory", "reserve_nbytes": 2}) == HostRoom(
        5, "free memory", 2
    )
    for document in (None, {"nbytes": 5}, {"nbytes": "x", "limit": "", "reserve_nbytes": 1}):
        with pytest.raises(InvalidInput):
            HostRoom.of_document(document)
