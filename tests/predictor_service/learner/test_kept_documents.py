"""Documents come back from the disk as they were, for this user only, bounded; what a crash left is no document."""

import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from predictor_service.learner.document import Document, block_of
from predictor_service.learner.kept_documents import KeptDocuments
from promoe.model_spec import ModelSpec
from tests.predictor_service.layer_events import make_spec
from tests.predictor_service.learner.test_gatherer import gathered
from tests.predictor_service.learner_feed import EVERY_SECOND, LAYER_INPUT
from tests.predictor_service.made_up_traces import learnable_spec


class Clock:
    def __init__(self) -> None:
        self.unix_s = 1.7e9

    def __call__(self) -> float:
        self.unix_s += 1.0
        return self.unix_s


def kept_in(folder: Path, clock: Clock, spec: ModelSpec | None = None, **bounds: float) -> KeptDocuments:
    max_nbytes, max_age_s = int(bounds.get("max_nbytes", 1 << 30)), bounds.get("max_age_s", 1e6)
    return KeptDocuments(folder, spec or learnable_spec(), max_nbytes, max_age_s, clock)


def names(kept: KeptDocuments) -> list[str]:
    return [document.name for document, _ in kept.load()]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [*gathered(3, EVERY_SECOND), *gathered(1, LAYER_INPUT)]


def test_they_come_back_as_they_were(tmp_path: Path, documents: list[Document]) -> None:
    clock = Clock()
    for document in documents:
        kept_in(tmp_path, clock).keep(document)
    back = list(kept_in(tmp_path, clock).load())
    assert [document.name for document, _ in back] == [document.name for document in documents]
    assert [age_s for _, age_s in back] == sorted((age_s for _, age_s in back), reverse=True)
    for (document, _), original in zip(back, documents, strict=True):
        assert document.observed is original.observed
        assert document.nbytes == original.nbytes
        one, other = block_of([document]), block_of([original])
        for name in ("hidden_SND", "topk_ids_LNK", "document_N", "is_decode_N", "seen_SN"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_nobody_else_may_read_them(tmp_path: Path, documents: list[Document]) -> None:
    kept_in(tmp_path / "new", Clock()).keep(documents[0])
    (folder,) = (tmp_path / "new").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_the_oldest_give_way_and_the_old_go(tmp_path: Path, documents: list[Document]) -> None:
    clock = Clock()
    kept = kept_in(tmp_path, clock)
    kept.keep(documents[0])
    (path,) = tmp_path.rglob("*.npz")
    nbytes = path.stat().st_size
    few = kept_in(tmp_path, clock, max_nbytes=2 * nbytes + 100)
    for document in documents[1:3]:
        few.keep(document)
    assert names(few) == [document.name for document in documents[1:3]]
    clock.unix_s += 1000
    assert names(kept_in(tmp_path, clock, max_age_s=900)) == []
    assert list(tmp_path.rglob("*.npz")) == []


def test_what_is_torn_or_of_another_model_is_ignored_and_removed(tmp_path: Path, documents: list[Document]) -> None:
    clock = Clock()
    kept = kept_in(tmp_path, clock)
    for document in documents[:3]:
        kept.keep(document)
    first, second, third = sorted(tmp_path.rglob("*.npz"))
    first.write_bytes(first.read_bytes()[:-200])
    damaged = bytearray(second.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    second.write_bytes(bytes(damaged))
    (first.parent / "half.part").write_bytes(b"half")
    (first.parent / "1700000001.0-text.npz").write_bytes(b"")
    assert names(kept) == [documents[2].name]
    assert list(first.parent.iterdir()) == [third]
    other = make_spec(layers=2)
    assert names(kept_in(tmp_path, clock, other)) == [], "the same fingerprint, and yet another model"


def test_a_folder_that_cannot_be_is_said_once_per_document_and_no_more(
    tmp_path: Path, documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    kept = kept_in(tmp_path / "file", Clock())
    kept.keep(documents[0])
    assert "cannot be kept" in caplog.text
    assert names(kept) == []
    kept.sweep()


def test_a_folder_that_may_not_be_read_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, pattern: str) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "glob", refuse)
    kept = kept_in(tmp_path, Clock())
    assert names(kept) == []
    kept.sweep()
    assert caplog.text.count("Permission denied") == 2
