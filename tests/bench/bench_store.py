"""The store's figures: arena fill against a plain read of the same bytes, re-attach after a restart, own memory.

    python -m tests.bench.bench_store --gib 2 --rounds 5 --out store.json

Fill and plain read alternate, on the same files, with the same threads and O_DIRECT; medians are compared.
Wanted: fill at least 0.8 of the plain read; re-attach below 1 s at any size; the store's own memory below 150 MB.
"""

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import xxhash

from compute_node.device.cpu import NoPinning
from compute_node.store_client import StoreClient, StoreState
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec
from promoe.pack_manifest import PackManifest, layer_file
from tests.bench.report import Sample, median_ratio, out_argument, write_report
from tests.node_doubles import RecordingListener, ignore_progress
from tests.running_store import RunningStore, wait_until

MIB: Final = 1 << 20
READ_NBYTES: Final = 16 * MIB
NUM_EXPERTS: Final = 16


@dataclass(frozen=True)
class Options:
    """What is measured."""

    gib: float
    rounds: int
    threads: int
    folder: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the JSON and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the largest arena")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; medians are reported")
    parser.add_argument("--threads", type=int, default=8, help="readers, of the store and of the plain read")
    parser.add_argument("--folder", type=Path, default=None, help="where the packs lie (the disk that is measured)")
    out_argument(parser)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        options = Options(chosen.gib, chosen.rounds, chosen.threads, Path(folder))
        path = write_report("store", {"file_system": mount_of(options.folder), **measure(options)}, chosen.out)
    print(path.read_text(), end="")


def mount_of(path: Path) -> str:
    """Device and type of the mount that holds the path."""
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [
        (target, f"{device} ({kind})") for device, target, kind in mounts if path.resolve().is_relative_to(target)
    ]
    return max(holding, key=lambda found: len(found[0]))[1]


def measure(options: Options) -> dict[str, object]:
    """All figures."""
    sizes = [options.gib / 8, options.gib / 2, options.gib]
    packs = {gib: write_pack(options.folder / f"pack-{gib:g}", gib) for gib in sizes}
    restarts = [measure_restarts(packs[gib], options) for gib in sizes]
    return {"fill": measure_fill(packs[options.gib], options), "restart": restarts}


@dataclass(frozen=True)
class Pack:
    """A pack for measuring."""

    folder: Path
    manifest: PackManifest

    @property
    def nbytes(self) -> int:
        """On disk, and in the arena."""
        return self.manifest.spec.num_blobs * self.manifest.spec.layout.blob_stride_nbytes


def write_pack(folder: Path, gib: float) -> Pack:
    """Blobs of 8 MiB of random bytes (each with its own first bytes), 16 experts per layer."""
    layout = ExpertLayout.of(Dtype.BFLOAT16, {"gate_up_proj": (2048, 1024), "down_proj": (1024, 2048)})
    num_layers = max(1, round(gib * 1024 * MIB / (NUM_EXPERTS * layout.blob_stride_nbytes)))
    spec = ModelSpec(
        name="bench",
        family="synthetic",
        fingerprint=xxhash.xxh3_128_hexdigest(f"{gib}".encode()),
        num_moe_layers=num_layers,
        num_experts=NUM_EXPERTS,
        experts_per_token=2,
        hidden_size=1024,
        vocab_size=100,
        max_context_tokens=64,
        layout=layout,
    )
    body = os.urandom(layout.blob_nbytes - 8)
    checksums = []
    layer_file(folder, 0).parent.mkdir(parents=True)
    for layer in range(num_layers):
        with layer_file(folder, layer).open("wb") as file:
            blobs = [(layer * NUM_EXPERTS + expert).to_bytes(8, "little") + body for expert in range(NUM_EXPERTS)]
            checksums.append(tuple(xxhash.xxh3_64_hexdigest(blob) for blob in blobs))
            file.writelines(blobs)
            file.flush()
            os.fsync(file.fileno())
    manifest = PackManifest(spec, tuple(checksums), tuple(f"layer {n}" for n in range(num_layers)), {}, {})
    manifest.write(folder)
    return Pack(folder, manifest)


def measure_fill(pack: Pack, options: Options) -> dict[str, object]:
    """Store fill and plain read in turns; each round starts with the other one."""
    fill_s: list[float] = []
    plain_s: list[float] = []
    own_nbytes: list[int] = []
    for number in range(options.rounds):
        for kind in ("fill", "plain") if number % 2 else ("plain", "fill"):
            if kind == "plain":
                plain_s.append(read_plainly(pack, options.threads))
                continue
            with store_of(pack, options, number) as store:
                store.wait_until_full(timeout_s=600)
                fill_s.append(store.stats().fill_s)
                own_nbytes.append(resident_nbytes(store.process.pid) - pack.nbytes)
    fill, plain = Sample(tuple(fill_s)), Sample(tuple(plain_s))
    return {
        "nbytes": pack.nbytes,
        "threads": options.threads,
        "fill_s": fill.as_dict(),
        "plain_read_s": plain.as_dict(),
        "fill_bytes_per_s": pack.nbytes / fill.median,
        "plain_read_bytes_per_s": pack.nbytes / plain.median,
        "fill_rate_to_plain_rate": median_ratio(plain_s, fill_s),
        "store_rss_beside_arena_nbytes": Sample(tuple(own_nbytes)).as_dict(),
    }


def read_plainly(pack: Pack, num_threads: int) -> float:
    """Seconds to read all layer files with O_DIRECT into buffers that are there already."""
    with ThreadPoolExecutor(num_threads) as threads:
        buffers = [mmap.mmap(-1, READ_NBYTES) for _ in range(num_threads)]
        for buffer in buffers:
            buffer.write(bytes(READ_NBYTES))
        pieces = iter(
            [
                (layer_file(pack.folder, layer), offset)
                for layer in range(pack.manifest.spec.num_moe_layers)
                for offset in range(0, NUM_EXPERTS * pack.manifest.spec.layout.blob_stride_nbytes, READ_NBYTES)
            ]
        )
        started = time.perf_counter()
        for reading in [threads.submit(_read_pieces, pieces, buffer) for buffer in buffers]:
            reading.result()
        return time.perf_counter() - started


def _read_pieces(pieces: Iterator[tuple[Path, int]], buffer: mmap.mmap) -> None:
    for path, offset in pieces:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            done = 0
            while done < READ_NBYTES:
                with memoryview(buffer)[done:] as target:
                    got = os.preadv(fd, [target], offset + done)
                if got == 0:
                    break
                done += got
        finally:
            os.close(fd)


def measure_restarts(pack: Pack, options: Options) -> dict[str, object]:
    """kill -9 and restart under an attached node, again and again."""
    from_start_s: list[float] = []
    from_serving_s: list[float] = []
    store = start_store(pack, options, 0)
    client = StoreClient(store.endpoint, None, NoPinning(), RecordingListener())
    try:
        client.attach(600, ignore_progress)
        uuid = client.arena_uuid
        for _ in range(options.rounds):
            store.kill()
            wait_until(lambda: client.state is StoreState.FROZEN)
            started = time.perf_counter()
            store = start_store(pack, options, 0)
            wait_until(partial(is_serving, store), timeout_s=60)
            serving = time.perf_counter()
            wait_until(lambda: client.state is StoreState.ATTACHED, timeout_s=60)
            attached = time.perf_counter()
            assert client.arena_uuid == uuid, "the arena was adopted, not filled anew"
            from_start_s.append(attached - started)
            from_serving_s.append(max(0.0, attached - serving))
    finally:
        client.close()
        store.kill()
    return {
        "nbytes": pack.nbytes,
        "attached_after_process_start_s": Sample(tuple(from_start_s)).as_dict(),
        "attached_after_serving_s": Sample(tuple(from_serving_s)).as_dict(),
    }


def start_store(pack: Pack, options: Options, number: int) -> RunningStore:
    """A store with its own run folder; its log is told apart from the former store's."""
    folder = options.folder / f"run-{pack.manifest.spec.num_moe_layers}-{number}"
    folder.mkdir(exist_ok=True)
    with (folder / "store.log").open("a") as log:
        log.write("restarts here\n")
    return RunningStore(pack.folder, folder, f"store.fill_threads={options.threads}")


def is_serving(store: RunningStore) -> bool:
    """True when the last store of this log has opened its sockets."""
    return "Serving " in store.log.read_text().rpartition("restarts here")[2]


@contextmanager
def store_of(pack: Pack, options: Options, number: int) -> Iterator[RunningStore]:
    """A fresh store, killed afterwards."""
    with start_store(pack, options, number + 1) as store:
        yield store


def resident_nbytes(pid: int) -> int:
    """The process's VmRSS."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
