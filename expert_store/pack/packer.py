"""Splits a checkpoint into an expert pack: a layer at a time, restartable, a pack only when whole."""

import errno
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Semaphore
from typing import Final

import torch
import transformers
import xxhash

from expert_store.pack.checkpoint import Checkpoint, TensorReader
from expert_store.pack.dense_folder import DenseFolderWriter
from expert_store.pack.families import no_experts
from expert_store.pack.journal import PackJournal, locked_pack_folder
from expert_store.pack.layer_file import LayerFileWriter, sync_folder
from expert_store.pack.meta_model import ConversionPlan, MetaModel, load_config
from expert_store.pack.model_geometry import model_spec, packed_dtype
from expert_store.pack.model_source import find_checkpoint
from expert_store.pack.progress import NoProgress, PackProgress
from expert_store.pack.verify import damaged_experts, damaged_files
from promoe.errors import InvalidInput, PackDamaged, ResourceExhausted
from promoe.model_spec import Dtype, ModelSpec
from promoe.pack_manifest import MANIFEST_FILE, PACK_VERSION, PackManifest

_PIECES_IN_FLIGHT: Final = 2
"""Converted pieces waiting to be written: bounds what packing holds in memory."""

_VOLATILE_CONFIG_KEYS: Final = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype"})
"""Differ between copies of one model; the fingerprint leaves them out."""


def pack_checkpoint(
    model: str | Path,
    pack_dir: Path,
    *,
    dtype: Dtype | None = None,
    progress: PackProgress | None = None,
) -> PackManifest:
    """Makes `pack_dir` a pack of `model`; goes on where an earlier call for the same model was stopped.

    Args:
        model: a checkpoint folder or a hub id.
        pack_dir: an empty or new folder, or one in which this model's packing was begun or finished. Of a finished
            pack the bytes are compared with their checksums, and only what is damaged is made again.
        dtype: what the model will compute in; by default what its config says.
        progress: told about steps.

    Raises:
        ModelNotFound, ModelUnsupported, PackDamaged: the checkpoint is not there, not supported, not whole.
        InvalidInput: `pack_dir` holds something else.
        AlreadyRunning: another process packs into it.
        ResourceExhausted: the disk is full; calling again with more room goes on.
    """
    checkpoint = find_checkpoint(model)
    config = load_config(checkpoint.folder)
    meta = MetaModel(config, dtype or packed_dtype(config, checkpoint))
    if not meta.experts:
        raise no_experts(checkpoint.name, checkpoint.config)
    spec = model_spec(checkpoint.name, str(checkpoint.config["model_type"]), meta, meta.layout())
    packing = _Packing(checkpoint, meta, meta.plan(checkpoint.tensors), spec, Path(pack_dir), progress or NoProgress())
    with locked_pack_folder(packing.pack_dir), _full_disk_is_a_sentence(packing.pack_dir), _one_torch_thread():
        return packing.run()


@dataclass(frozen=True)
class _Packing:
    """One call of `pack_checkpoint`, after its source is known to be sound."""

    checkpoint: Checkpoint
    model: MetaModel
    plan: ConversionPlan
    spec: ModelSpec
    pack_dir: Path
    progress: PackProgress

    @property
    def source_fingerprint(self) -> str:
        return f"{self.checkpoint.fingerprint}-{self.model.dtype.value}"

    @property
    def layer_nbytes(self) -> int:
        return self.spec.num_experts * self.spec.layout.blob_stride_nbytes

    @property
    def layer_weights_nbytes(self) -> int:
        """Without what lies between tensors and blobs."""
        return self.spec.num_experts * sum(slot.nbytes for slot in self.spec.layout.tensors)

    @property
    def dense_nbytes(self) -> int:
        return sum(self.model.state_nbytes(target) for unit in self.plan.dense for target in unit.targets)

    def run(self) -> PackManifest:
        journal = self._open_journal()
        finished = self._sound_layers(journal)
        dense = journal.dense_checksums()
        if dense is not None and damaged_files(self.pack_dir, dense):
            dense = None
        missing = [layer for layer in range(self.spec.num_moe_layers) if layer not in finished]
        dense_todo_nbytes = 0 if dense is not None else self.dense_nbytes
        self._refuse_small_disk(dense_todo_nbytes + len(missing) * self.layer_nbytes)
        if missing or dense is None:
            # Not before: a sound pack stays one, however this call may end.
            journal.take_apart()
        if self.plan.ignored:
            self.progress.note(
                f"The model has no place for {len(self.plan.ignored)} tensors of the checkpoint, for example "
                f"{self.plan.ignored[0]}; they are left out, as Transformers does."
            )
        self.progress.begin(
            f"Packing {self.checkpoint.name}",
            dense_todo_nbytes + len(missing) * self.layer_weights_nbytes,
            len(missing),
        )
        with self.checkpoint.open() as read:
            if dense is None:
                dense = self._pack_dense(read)
                journal.record_dense(dense)
            finished |= self._pack_layers(missing, read, journal)
        manifest = self._manifest(finished, dense)
        manifest.write(self.pack_dir)
        sync_folder(self.pack_dir)
        journal.close()
        return manifest

    def _open_journal(self) -> PackJournal:
        manifest = self._finished_manifest()
        if manifest is not None and manifest.source_fingerprint != self.source_fingerprint:
            raise InvalidInput(
                f"{self.pack_dir} holds a pack of {manifest.spec.name} ({manifest.spec.layout.dtype.value}, made from "
                f"other files than these of {self.checkpoint.name}). Give another folder, or delete this one first."
            )
        converter = f"pack {PACK_VERSION}, transformers {transformers.__version__}, torch {torch.__version__}"
        journal = PackJournal(self.pack_dir, self.source_fingerprint, converter, keep=manifest is not None)
        if manifest is not None:
            journal.adopt(manifest)
        return journal

    def _finished_manifest(self) -> PackManifest | None:
        """None also for a manifest that cannot be read: nothing beside it can be trusted then, and all is made anew."""
        try:
            return PackManifest.read(self.pack_dir) if (self.pack_dir / MANIFEST_FILE).is_file() else None
        except PackDamaged as error:
            self.progress.note(f"{error} Packing everything anew.")
            (self.pack_dir / MANIFEST_FILE).unlink()
            return None

    def _sound_layers(self, journal: PackJournal) -> dict[int, tuple[str, ...]]:
        """Checksums of the layers that an earlier call finished and whose bytes are still those."""
        claimed = {layer: journal.layer_checksums(layer) for layer in range(self.spec.num_moe_layers)}
        claims = {layer: sums for layer, sums in claimed.items() if sums is not None}
        if not claims:
            return {}
        self.progress.begin("Checking what is already packed", len(claims) * self.layer_nbytes, len(claims))
        damaged = damaged_experts(self.pack_dir, self.spec.layout, claims, self.progress)
        bad_layers = {expert.layer for expert in damaged}
        return {layer: sums for layer, sums in claims.items() if layer not in bad_layers}

    def _refuse_small_disk(self, todo_nbytes: int) -> None:
        free_nbytes = shutil.disk_usage(self.pack_dir).free
        if free_nbytes < todo_nbytes:
            raise ResourceExhausted(
                f"Packing needs {todo_nbytes / 1e9:.2f} GB more on the disk of {self.pack_dir}, and "
                f"{free_nbytes / 1e9:.2f} GB are free. Make room or give a folder on another disk."
            )

    def _pack_dense(self, read: TensorReader) -> dict[str, str]:
        writer = DenseFolderWriter(self.model, self.pack_dir)
        for nbytes in writer.write(self.plan.dense, read, self.checkpoint.folder):
            self.progress.advance(nbytes)
        return writer.checksums()

    def _pack_layers(self, layers: list[int], read: TensorReader, journal: PackJournal) -> dict[int, tuple[str, ...]]:
        """Three stages, each in one thread: convert (here), write with checksums, make durable."""
        room = Semaphore(_PIECES_IN_FLIGHT)
        finishing: list[tuple[int, Future[tuple[str, ...]]]] = []
        # Left in the order of writing: both threads have ended before a file that they might write to is closed.
        with (
            ExitStack() as writers,
            ThreadPoolExecutor(1, "pack-sync") as syncing,
            ThreadPoolExecutor(1, "pack-write") as writing,
        ):
            for layer in layers:
                writer = LayerFileWriter(self.pack_dir, layer, self.spec.layout, self.spec.num_experts)
                writers.callback(writer.abandon)
                puts: list[Future[None]] = []
                for first_expert, converted in self.model.convert_layer(self.plan.layers[layer], read):
                    room.acquire()
                    _raise_first_failure([*puts, *(future for _, future in finishing)])
                    puts.append(writing.submit(self._put, writer, first_expert, converted, room))
                finishing.append((layer, syncing.submit(self._finish, writer, puts, layer, journal)))
            return {layer: future.result() for layer, future in finishing}

    def _put(
        self, writer: LayerFileWriter, first_expert: int, converted: dict[str, torch.Tensor], room: Semaphore
    ) -> None:
        try:
            writer.put(first_expert, {target.rpartition(".")[2]: tensor for target, tensor in converted.items()})
            self.progress.advance(sum(tensor.nbytes for tensor in converted.values()))
        finally:
            room.release()

    def _finish(
        self, writer: LayerFileWriter, puts: list[Future[None]], layer: int, journal: PackJournal
    ) -> tuple[str, ...]:
        for put in puts:
            put.result()
        checksums = writer.finish()
        journal.record_layer(layer, checksums)
        self.progress.finish_layer()
        return checksums

    def _manifest(self, checksums: dict[int, tuple[str, ...]], dense: dict[str, str]) -> PackManifest:
        blobs = tuple(checksums[layer] for layer in range(self.spec.num_moe_layers))
        return PackManifest(
            spec=replace(self.spec, fingerprint=self._fingerprint(blobs, dense)),
            blob_checksums=blobs,
            layer_modules=tuple(module.name for module in self.model.experts),
            dense_checksums=dense,
            packed_with={"transformers": transformers.__version__, "torch": str(torch.__version__)},
            source_fingerprint=self.source_fingerprint,
        )

    def _fingerprint(self, blobs: tuple[tuple[str, ...], ...], dense: dict[str, str]) -> str:
        """xxh3-128 over config, dtype and checksums: the same model packed twice has the same one."""
        config = {key: value for key, value in self.checkpoint.config.items() if key not in _VOLATILE_CONFIG_KEYS}
        weights = {path: checksum for path, checksum in dense.items() if not path.endswith("/config.json")}
        content = [config, self.model.dtype.value, blobs, weights]
        return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


@contextmanager
def _full_disk_is_a_sentence(pack_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceExhausted(
                f"The disk of {pack_dir} is full ({error.strerror}). Make room and run the same command again: what is "
                "packed already is kept."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InvalidInput(f"{pack_dir} cannot be written ({error.strerror}).") from error
        raise


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Conversion copies memory; a second thread in it only waits for page faults and fights the writer (measured: a
    tenth of the rate on two busy cores)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _raise_first_failure(futures: list[Future[None] | Future[tuple[str, ...]]]) -> None:
    for future in futures:
        if future.done():
            future.result()
