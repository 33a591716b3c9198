"""Packing against a plain copy of the same checkpoint on the same disk.

    python -m tests.bench.bench_pack --gib 2 --rounds 5 --out pack.json

Both end with fsync and take turns; the checkpoint is in the page cache for both. Medians are compared. Wanted: packing
at 0.5 of the copy's rate at least, in memory that does not grow with the model.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expert_store.pack.packer import pack_checkpoint
from expert_store.pack.verify import verify_pack
from tests.bench.report import ROOT, Sample, median_ratio, out_argument, write_report

NUM_EXPERTS: Final = 64
_SAMPLE_S: Final = 0.01


@dataclass(frozen=True)
class Options:
    """What is measured."""

    checkpoint: Path
    rounds: int
    folder: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the JSON and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=None, help="checkpoint folder; default: a Qwen3-MoE of random bits"
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint that is made")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; medians are reported")
    parser.add_argument("--folder", type=Path, default=None, help="where files are written (the disk that is measured)")
    out_argument(parser)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        checkpoint = chosen.model or write_checkpoint_elsewhere(Path(folder) / "checkpoint", chosen.gib)
        report = measure(Options(checkpoint, chosen.rounds, Path(folder)))
    print(write_report("pack", report, chosen.out).read_text(), end="")


def write_checkpoint_elsewhere(folder: Path, gib: float) -> Path:
    """In a process of its own: gigabytes that came and went change how the measured one gets its memory."""
    lines = "import sys; from pathlib import Path; from tests.bench.bench_pack import write_checkpoint as write"
    command = [sys.executable, "-c", f"{lines}; write(Path(sys.argv[1]), float(sys.argv[2]))", str(folder), str(gib)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return folder


def write_checkpoint(folder: Path, gib: float) -> Path:
    """A Qwen3-MoE checkpoint as the hub has them: shards, a tensor per expert and projection, bfloat16."""
    shape = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 8}
    layer_nbytes = NUM_EXPERTS * 3 * 1024 * 768 * 2
    num_layers = max(1, round(gib * (1 << 30) / layer_nbytes))
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
    config = AutoConfig.for_model("qwen3_moe", **shape, **heads, num_hidden_layers=num_layers, vocab_size=32000)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    noise = torch.randint(0, 1 << 15, (1 << 20,), dtype=torch.int16).view(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            repeats = -(-parameter.numel() // len(noise))
            parameter.copy_(noise.repeat(repeats)[: parameter.numel()].view(parameter.shape))
    model.save_pretrained(folder, max_shard_size="1GB")
    return folder


def measure(options: Options) -> dict[str, object]:
    """All figures."""
    nbytes = sum(path.stat().st_size for path in options.checkpoint.glob("*.safetensors"))
    copied, packed = options.folder / "copy", options.folder / "pack"
    copy_s: list[float] = []
    pack_s: list[float] = []
    cpu_s: list[float] = []
    for number in range(options.rounds):
        for kind in ("copy", "pack") if number % 2 else ("pack", "copy"):
            target = copied if kind == "copy" else packed
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            started, started_cpu = time.perf_counter(), time.process_time()
            if kind == "copy":
                copy_durably(options.checkpoint, copied)
                copy_s.append(time.perf_counter() - started)
            else:
                pack_checkpoint(options.checkpoint, packed)
                pack_s.append(time.perf_counter() - started)
                cpu_s.append(time.process_time() - started_cpu)
    verify_s = seconds_of_verifying(packed, options.rounds)
    copy, pack = Sample(tuple(copy_s)), Sample(tuple(pack_s))
    return {
        "checkpoint_nbytes": nbytes,
        "copy_s": copy.as_dict(),
        "pack_s": pack.as_dict(),
        "pack_cpu_s": Sample(tuple(cpu_s)).as_dict(),
        "copy_bytes_per_s": nbytes / copy.median,
        "pack_bytes_per_s": nbytes / pack.median,
        "pack_rate_to_copy_rate": median_ratio(copy_s, pack_s),
        "verify_s": verify_s.as_dict(),
        **run_the_command(options.checkpoint, packed),
    }


def copy_durably(source: Path, target: Path) -> None:
    """What `cp -r` and `sync` do."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def seconds_of_verifying(pack_dir: Path, rounds: int) -> Sample:
    """Reading a pack that is in the page cache and comparing its checksums."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        verify_pack(pack_dir)
        found.append(time.perf_counter() - started)
    return Sample(tuple(found))


def run_the_command(checkpoint: Path, pack_dir: Path) -> dict[str, object]:
    """The whole command in its own process, imports included: its time, and its own memory (without mapped files)."""
    shutil.rmtree(pack_dir)
    started = time.perf_counter()
    command = [sys.executable, "-m", "expert_store.pack", str(checkpoint), str(pack_dir)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        peak_nbytes = 0
        while process.poll() is None:
            peak_nbytes = max(peak_nbytes, anonymous_nbytes(process.pid))
            time.sleep(_SAMPLE_S)
    assert process.returncode == 0, f"packing ended with {process.returncode}"
    return {"command_s": time.perf_counter() - started, "command_peak_anonymous_nbytes": peak_nbytes}


def anonymous_nbytes(pid: int) -> int:
    """RssAnon of a process; 0 when it has just ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:")), 0)


if __name__ == "__main__":
    main()
