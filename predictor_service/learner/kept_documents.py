"""Documents on the disk, where somebody asked for it: a file each, for this user only, of bounded size and age.

Hidden states may reveal the text they were made from; see LearnerConfig.keep_on_disk.
"""

import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from predictor_service.learner.document import Document, SeenToken
from promoe.hint import ObservedKind
from promoe.model_spec import ModelSpec

logger = logging.getLogger(__name__)

_SUFFIX: Final = ".npz"
_PARTIAL_SUFFIX: Final = ".part"


class KeptDocuments:
    """One model's documents in a folder.

    Args:
        folder: made with the first document; each model has its own folder in it.
        spec: the model.
        max_nbytes: of all files; the oldest give way.
        max_age_s: after which a file is removed.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        max_nbytes: int,
        max_age_s: float,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder / spec.fingerprint
        self._spec = spec
        self._max_nbytes = max_nbytes
        self._max_age_s = max_age_s
        self._wall_clock = wall_clock
        self._number = 0

    def keep(self, document: Document) -> None:
        """Writes it, whole or not at all, and removes what is too much or too old; a disk that is full is said."""
        self._number += 1
        now_unix_s = self._wall_clock()
        path = self._folder / f"{now_unix_s:017.6f}-{os.getpid()}-{self._number}{_SUFFIX}"
        partial = path.with_suffix(_PARTIAL_SUFFIX)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                np.savez(file, allow_pickle=False, **_arrays_of(document))
            partial.replace(path)
            self.remove_old()
        except OSError as error:
            with suppress(OSError):  # of a folder that is none
                partial.unlink(missing_ok=True)
            logger.warning("A document cannot be kept in %s (%s).", self._folder, error.strerror or error)

    def load(self) -> Iterator[tuple[Document, float]]:
        """Those that can be read, oldest first, and how old they are; what a crash left half is swept away."""
        try:
            for partial in self._folder.glob(f"*{_PARTIAL_SUFFIX}"):
                partial.unlink(missing_ok=True)
            self.remove_old()
            files = self._files()
        except OSError as error:
            logger.warning("What was kept in %s cannot be used (%s).", self._folder, error.strerror or error)
            return
        for path in files:
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    document = _document_of(arrays)
                _check(document, self._spec)
            except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
                logger.warning("%s is no document that can be used, and is removed (%s).", path, error)
                path.unlink(missing_ok=True)
                continue
            yield document, max(0.0, self._wall_clock() - _written_unix_s(path))

    def sweep(self) -> None:
        """`remove_old`, from time to time; a disk that does not let it is said."""
        try:
            self.remove_old()
        except OSError as error:
            logger.warning("What is too old in %s cannot be removed (%s).", self._folder, error.strerror or error)

    def remove_old(self) -> None:
        """Removes what is older than it may be, and the oldest of what is too much."""
        oldest_unix_s = self._wall_clock() - self._max_age_s
        nbytes = 0
        for path in reversed(self._files()):
            with suppress(FileNotFoundError):  # a learner of another service may have been quicker
                nbytes += path.stat().st_size
            if nbytes > self._max_nbytes or _written_unix_s(path) < oldest_unix_s:
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Oldest first."""
        return sorted(self._folder.glob(f"*{_SUFFIX}"))


def _written_unix_s(path: Path) -> float:
    """From its name; a file of another name is as old as can be."""
    try:
        return float(path.name.partition("-")[0])
    except ValueError:
        return 0.0


def _arrays_of(document: Document) -> dict[str, np.ndarray]:
    tokens = document.tokens
    return {
        "name": np.array(document.name),
        "observed": np.array(document.observed.value),
        "hidden_VD": np.concatenate([token.hidden_VD for token in tokens]),
        "seen_NS": np.stack([token.seen_S for token in tokens]),
        "topk_ids_NLK": np.stack([token.topk_ids_LK for token in tokens]),
        "is_decode_N": np.array([token.is_decode for token in tokens]),
        "follows_N": np.array([token.follows for token in tokens]),
    }


def _document_of(arrays: "np.lib.npyio.NpzFile") -> Document:
    document = Document(str(arrays["name"]), ObservedKind(str(arrays["observed"])))
    seen_NS = arrays["seen_NS"].astype(np.bool_)
    hidden = np.split(arrays["hidden_VD"].astype(np.uint16), np.cumsum(seen_NS.sum(axis=1))[:-1])
    parts = zip(
        hidden, seen_NS, arrays["topk_ids_NLK"].astype(np.uint16), arrays["is_decode_N"], arrays["follows_N"],
        strict=True,
    )  # fmt: skip
    for hidden_VD, seen_S, topk_ids_LK, is_decode, follows in parts:
        document.add(SeenToken(hidden_VD.copy(), seen_S, topk_ids_LK, bool(is_decode), bool(follows)))
    return document


def _check(document: Document, spec: ModelSpec) -> None:
    """Raises ValueError for what is not of this model."""
    num_sources = spec.num_moe_layers + (document.observed is ObservedKind.LAYER_INPUT)
    for token in document.tokens:
        if token.topk_ids_LK.shape != (spec.num_moe_layers, spec.experts_per_token):
            raise ValueError(f"its routings have the shape {token.topk_ids_LK.shape}")
        if token.seen_S.shape != (num_sources,) or token.hidden_VD.shape != (token.seen_S.sum(), spec.hidden_size):
            raise ValueError(f"its hidden states have the shape {token.hidden_VD.shape}")
        if int(token.topk_ids_LK.max()) >= spec.num_experts:
            raise ValueError(f"it names expert {token.topk_ids_LK.max()}")
