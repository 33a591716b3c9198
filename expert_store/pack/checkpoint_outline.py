"""What a checkpoint looks like without its weights: config, headers and file sizes, from a folder or over the network.

A hub model's headers are read by range requests (huggingface_hub's `get_safetensors_metadata`): a few megabytes for a
model of hundreds of gigabytes.
"""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, NotASafetensorsRepoError, SafetensorsParsingError

from expert_store.pack.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    StoredTensor,
    read_config,
    refuse_quantised_tensors,
)
from expert_store.pack.dense_folder import COPIED_FILES
from expert_store.pack.families import refuse_unsupported_config
from expert_store.pack.model_source import SMALL_FILES, WEIGHT_FILES, checked_hub_id, download, hub_failures
from promoe.errors import ModelNotFound, ModelUnsupported, PackDamaged


@dataclass(frozen=True)
class CheckpointOutline:
    """A checkpoint whose weights need not be here.

    Attributes:
        checkpoint: config and headers; it can be opened only where nothing is to be downloaded.
        copied_nbytes: of the files that a pack has as they are.
        download_nbytes: what packing would download first; 0 for what is here.
        download_folder: where it would come to lie; None for what is here.
        read_from: for people.
    """

    checkpoint: Checkpoint
    copied_nbytes: int
    download_nbytes: int
    download_folder: Path | None
    read_from: str


def find_outline(model: str) -> CheckpointOutline:
    """The outline of a local folder, of a hub model that was downloaded before, or of one on the hub.

    Raises:
        ModelNotFound: no such folder, no such hub model, or the hub cannot be reached.
        ModelUnsupported: the checkpoint's files or config rule it out.
        PackDamaged: the checkpoint is damaged.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _outline_of_folder(folder.resolve().name, folder.resolve(), f"the headers in {folder}")
    hub_id = checked_hub_id(model)
    return _outline_of_cached(hub_id) or _outline_of_hub(hub_id)


def _outline_of_folder(name: str, folder: Path, read_from: str) -> CheckpointOutline:
    refuse_unsupported_config(name, read_config(folder))
    copied = {path for pattern in COPIED_FILES for path in folder.glob(pattern) if path.is_file()}
    copied_nbytes = sum(path.stat().st_size for path in copied)
    return CheckpointOutline(Checkpoint.read(name, folder), copied_nbytes, 0, None, read_from)


def _outline_of_cached(hub_id: str) -> CheckpointOutline | None:
    """None where the hub's local cache lacks the model, or files of it."""
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
        return _outline_of_folder(hub_id, folder, "the headers in the hub's local cache")
    except (LocalEntryNotFoundError, ModelNotFound):
        return None


def _outline_of_hub(hub_id: str) -> CheckpointOutline:
    folder = download(hub_id, (CONFIG_FILE,))
    config = read_config(folder)
    refuse_unsupported_config(hub_id, config)
    hub = HfApi()
    try:
        with hub_failures(hub_id):
            found = hub.get_safetensors_metadata(hub_id)
            siblings = hub.model_info(hub_id, files_metadata=True).siblings or []
    except NotASafetensorsRepoError as error:
        raise ModelUnsupported(
            f"{hub_id} holds no safetensors weights, the only format promoe packs. Look for a converted copy."
        ) from error
    except SafetensorsParsingError as error:
        raise PackDamaged(f"{hub_id} has a damaged safetensors header ({error}).") from error
    tensors = {
        name: StoredTensor(Path(file), info.dtype, tuple(info.shape), *info.data_offsets)
        for file, metadata in found.files_metadata.items()
        for name, info in metadata.tensors.items()
    }
    if missing := [name for name in found.weight_map if name not in tensors]:
        raise PackDamaged(f"The index of {hub_id} names {len(missing)} tensors that its files lack: {missing[0]} …")
    refuse_quantised_tensors(hub_id, tensors)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    return CheckpointOutline(
        checkpoint=Checkpoint(hub_id, folder, config, tensors, fingerprint=""),
        copied_nbytes=_total(sizes, COPIED_FILES),
        download_nbytes=_total(sizes, (*SMALL_FILES, *WEIGHT_FILES)),
        download_folder=Path(constants.HF_HUB_CACHE),
        read_from=f"the headers of {len(found.files_metadata)} files on the hub",
    )


def _total(sizes: dict[str, int], patterns: tuple[str, ...]) -> int:
    return sum(nbytes for name, nbytes in sizes.items() if any(fnmatch(name, pattern) for pattern in patterns))
