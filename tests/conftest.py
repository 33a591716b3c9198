"""Fixtures that several packages' tests share: short folders for sockets, and the demo model, built once."""

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest

from compute_node.compilation import execution
from promoe.errors import PromoeError
from promoe.model_spec import Dtype

DEMO_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "demo"
"""Kept between sessions; git ignores it, `make clean` removes it."""

# Examples are bounded by their number, not by the clock: machines that test are busy ones.
hypothesis.settings.register_profile(
    "promoe", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], print_blob=True
)
hypothesis.settings.load_profile("promoe")


def pytest_report_header() -> str:
    """What is tested; nothing, where it would not be what the sources say."""
    try:
        return f"placement: {execution().value}"
    except PromoeError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `gpu` where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device on this machine"))


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards: commands that run in this process log to a stream that ends with a test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """A folder with a path short enough for unix sockets, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def module_socket_dir() -> Iterator[Path]:
    """The same for what a module's tests share."""
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def session_socket_dir() -> Iterator[Path]:
    """The same for what all of a folder's tests share."""
    with tempfile.TemporaryDirectory(prefix="promoe", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model's Hugging Face checkpoint."""
    from expert_store.demo_model.build import build_demo_model

    with _one_builder():
        return build_demo_model(DEMO_CACHE / "checkpoint")


@pytest.fixture(scope="session")
def demo_pack_bf16(demo_checkpoint: Path) -> Path:
    """The demo model's pack in its own precision."""
    return _pack(demo_checkpoint, Dtype.BFLOAT16)


@pytest.fixture(scope="session")
def demo_pack_fp32(demo_checkpoint: Path) -> Path:
    """The demo model's pack in single precision, where equal tokens can be asked for at any batch."""
    return _pack(demo_checkpoint, Dtype.FLOAT32)


def _pack(checkpoint: Path, dtype: Dtype) -> Path:
    from expert_store.pack.packer import pack_checkpoint

    pack_dir = DEMO_CACHE / f"pack_{dtype.value}"
    with _one_builder():
        try:
            pack_checkpoint(checkpoint, pack_dir, dtype=dtype)
        except PromoeError:  # left by another version of the packer or of the demo model
            shutil.rmtree(pack_dir)
            pack_checkpoint(checkpoint, pack_dir, dtype=dtype)
    return pack_dir


@contextmanager
def _one_builder() -> Iterator[None]:
    """Sessions that start together wait for the first one's work instead of doing it again."""
    DEMO_CACHE.mkdir(parents=True, exist_ok=True)
    with (DEMO_CACHE / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
