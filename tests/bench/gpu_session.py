"""Everything that needs a GPU, in one command for a machine that is borrowed for minutes:

    python -m tests.bench.gpu_session --out DIR [--then NAME=COMMAND …]
    python -m tests.bench.gpu_session --out DIR --only bench_device

The first call is over within ten minutes: the machine's facts, the tests marked `gpu`, the ablation on a full-size
model, and what is appended with `--then` (checks of the arena and the driver, say); the second one is the sweep over
cache rates. Steps run one after the other, each in processes of its own with a time limit of its own; each writes
DIR/NAME.txt as it goes, and a step that fails keeps none of the others from running. DIR/session.json says how each one
ended.

The package need not be installed: a borrowed machine has torch, Transformers and numpy, and this working tree. What it
lacks beside them (the first step says) is brought along as wheels: WHEELS and what they depend on. Neither pyarrow nor
matplotlib is needed. Where the tree comes without its history, PROMOE_COMMIT names the commit. Where somebody else's
package is called `tests`, empty `__init__.py` files in `tests` and its folders keep ours in front.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Final

from tests.bench.report import environment

ROOT: Final = Path(__file__).resolve().parents[2]
EXTRA_LIMIT_S: Final = 90.0
ONE_CALL: Final = ("facts", "gpu_tests", "gpu_ablation")
"""What is run unless `--only` says otherwise; with one further step it takes less than ten minutes."""

GPU_MARK: Final = "pytest.mark." + "gpu"
KILL_AFTER_S: Final = 10.0
MODULES: Final = (
    *("torch", "transformers", "accelerate", "safetensors", "numpy", "psutil", "xxhash", "prometheus_client", "grpc"),
    *("grpc_health", "grpc_reflection", "google.protobuf", "gguf", "jinja2", "pytest", "pytest_timeout", "hypothesis"),
    *("cuda.bindings.driver", "promoe", "compute_node.node", "expert_store.store", "predictor_service.predictor"),
    *("promoe.cli.trace_picture", "tests.bench.bench_gpu_ablation"),
)
WHEELS: Final = (
    *("grpcio", "grpcio-health-checking", "grpcio-reflection", "protobuf", "xxhash", "prometheus_client", "psutil"),
    *("gguf", "accelerate", "pytest", "pytest-timeout", "hypothesis", "typer", "rich"),
)
"""Distributions of the lock that a machine with torch and Transformers may lack."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of its log.
        command: arguments, run in the repository's root.
        limit_s: after which it is ended.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended; `status` is its exit status, negative for a signal."""

    name: str
    status: int
    timed_out: bool
    wall_s: float
    command: tuple[str, ...]

    def __str__(self) -> str:
        ending = "out of time" if self.timed_out else f"status {self.status}"
        return f"{self.name}: {ending} after {self.wall_s:.0f} s"


def planned_steps(
    out: Path, extra: Sequence[str], ablation_arguments: Sequence[str], bench_arguments: Sequence[str], scale: float
) -> list[Step]:
    """In the order of what would be missed most; `scale` stretches the limits."""
    # Only files that have such tests: others import what a borrowed machine may lack.
    files = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/**/test_*.py") if GPU_MARK in p.read_text())
    # Warnings are shown, not raised: that machine's packages are not those of the lock.
    tests = ("-m", "pytest", "-m", "gpu", "-q", "-rA", "-W", "default", "-p", "no:cacheprovider", *files)
    ablation = ("-m", "tests.bench.bench_gpu_ablation", "--out", str(out / "gpu_ablation.json"))
    bench = ("-m", "tests.bench.bench_device", "--out", str(out / "device.json"), *bench_arguments)
    steps = [
        Step("facts", (sys.executable, "-m", "tests.bench.gpu_session", "--facts"), 40 * scale),
        Step("gpu_tests", (sys.executable, *tests), 150 * scale),
        Step("gpu_ablation", (sys.executable, *ablation, *ablation_arguments), 300 * scale),
        Step("bench_device", (sys.executable, *bench), 330 * scale),
    ]
    for entry in extra:
        name, separator, command = entry.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"--then is {entry!r}; expected NAME=COMMAND with a name of letters, digits and _")
        steps.append(Step(name, ("bash", "-c", command), EXTRA_LIMIT_S * scale))
    return steps


def run_step(step: Step, out: Path, variables: Mapping[str, str]) -> Outcome:
    """Runs it to its end or its limit; the log is there from the first line on."""
    started_s = perf_counter()
    timed_out = False
    with (out / f"{step.name}.txt").open("wb") as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(step.limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
            status = _end(process)
    return Outcome(step.name, status, timed_out, perf_counter() - started_s, step.command)


def _end(process: "subprocess.Popen[bytes]") -> int:
    """The step and what it started: first asked, then made to."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(KILL_AFTER_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def step_environment(site: Path) -> dict[str, str]:
    """This process's, with the working tree importable and its version known, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = site / f"{project['name']}-{project['version']}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    paths = [str(ROOT / "proto"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), str(site)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def print_facts() -> int:
    """The machine, and which of the modules that steps import are missing; status 1 if any is."""
    missing = 0
    for name in MODULES:
        try:
            import_module(name)
        except ImportError as error:
            missing += 1
            print(f"missing: {name}: {error}", flush=True)
    print(f"{missing} modules missing; what can be brought along: {', '.join(WHEELS)}", flush=True)
    print(json.dumps(environment(), indent=1))
    return 1 if missing else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Status 1 when a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for logs and JSON")
    parser.add_argument("--then", action="append", default=[], metavar="NAME=COMMAND", help="a further step")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these steps alone")
    parser.add_argument("--scale", type=float, default=1.0, help="stretches every time limit")
    parser.add_argument("--facts", action="store_true", help="the first step, in this process")
    parser.add_argument("--ablation", default="", help="arguments of bench_gpu_ablation, in one string")
    parser.add_argument("--bench", default="", help="arguments of bench_device, in one string")
    options = parser.parse_args(arguments)
    if options.facts:
        return print_facts()
    if options.out is None:
        parser.error("--out is needed")
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = planned_steps(out, options.then, options.ablation.split(), options.bench.split(), options.scale)
    wanted = options.only or (*ONE_CALL, *(entry.partition("=")[0] for entry in options.then))
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as site:
        variables = step_environment(Path(site))
        for step in steps:
            if step.name not in wanted:
                continue
            outcomes.append(run_step(step, out, variables))
            print(outcomes[-1], flush=True)
            (out / "session.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 1 if any(outcome.status != 0 for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
