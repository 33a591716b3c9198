"""Finds the checkpoint a person named: a local folder, or a hub id that is downloaded."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from expert_store.pack.checkpoint import Checkpoint, read_config
from expert_store.pack.families import refuse_unsupported_config
from promoe.errors import ModelNotFound, ResourceExhausted

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_HTTP_ERROR: Final[type[BaseException]] = HfHubHTTPError.__mro__[1]
"""The HTTP library's own error: huggingface_hub 1 is built on httpx, 2 on httpx2."""

SMALL_FILES: Final = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
WEIGHT_FILES: Final = ("model*.safetensors",)
"""`model-00001-of-00002.safetensors`, but also `model.safetensors-00001-of-00002.safetensors`."""


def find_checkpoint(model: str | Path) -> Checkpoint:
    """The checkpoint behind a local folder or a hub id.

    A hub model's config is judged before its weights are downloaded.

    Raises:
        ModelNotFound: no such folder, no such hub model, or the hub cannot be reached.
        ModelUnsupported: the checkpoint's files or config rule it out.
        PackDamaged: the checkpoint is damaged.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        name = folder.name
        refuse_unsupported_config(name, read_config(folder))
        return Checkpoint.read(name, folder)
    hub_id = checked_hub_id(model)
    small = download(hub_id, SMALL_FILES)
    refuse_unsupported_config(hub_id, read_config(small))
    return Checkpoint.read(hub_id, download(hub_id, WEIGHT_FILES))


def checked_hub_id(model: str | Path) -> str:
    """What is no folder must be a hub id; raises ModelNotFound if it cannot be one."""
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise ModelNotFound(f"There is no folder {model}, and it is not a hub id such as `owner/name`.")
    return model


def download(hub_id: str, patterns: tuple[str, ...]) -> Path:
    """Files of a hub model, in the hub's local cache; returns their folder. Errors are those of `hub_failures`."""
    with hub_failures(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))


@contextmanager
def hub_failures(hub_id: str) -> Iterator[None]:
    """Says in a sentence what the hub did not give.

    Raises:
        ModelNotFound: no such model, or none that can be had from here.
        ResourceExhausted: the disk of the local cache is full.
    """
    try:
        yield
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{hub_id} is gated: accept its terms on the hub, then log in with `hf auth login` and try again."
        ) from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise _unreachable(hub_id, error) from error
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ModelNotFound(f"There is no folder {hub_id}, and the hub has no model of that name.") from error
    except _HTTP_ERROR as error:
        raise _unreachable(hub_id, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted(
                "The disk of the hub cache is full. Make room, or set HF_HOME to a folder on another disk."
            ) from error
        raise


def _unreachable(hub_id: str, error: BaseException) -> ModelNotFound:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ModelNotFound(
        f"There is no folder {hub_id}, it is not in the local hub cache, and the hub cannot be reached ({reason}). "
        "Connect, or download the model elsewhere with `hf download` and give its folder."
    )
