"""The stack of deploy/compose.yaml on an engine: built, started and watched through compose and the docker SDK."""

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import docker
import openai
from docker.models.containers import Container

from promoe import Client
from promoe.retry import RetryPolicy
from tests.source_tree import ROOT

DEPLOY: Final = ROOT / "deploy"
SERVICES: Final = ("expert-store", "predictor", "compute-node")
PROMPT: Final = ({"role": "user", "content": "What is gravity?"},)

_HEAL_DEADLINE_S: Final = 120
_COMMAND_DEADLINE_S: Final = 1800.0
# The service is the child of the container's init; an exec'd process has no parent in there.
_KILL_SERVICE: Final = """
import os, pathlib, signal
for status in pathlib.Path("/proc").glob("[0-9]*/status"):
    if "\\nPPid:\\t1\\n" in status.read_text():
        os.kill(int(status.parent.name), signal.SIGKILL)
"""


class ContainerStack:
    """One compose project.

    Args:
        environment: with which docker's client finds the engine, and compose its variables.
        files: of deploy/, in order.
    """

    def __init__(self, environment: Mapping[str, str], files: tuple[str, ...], project: str) -> None:
        self._environment = {**environment}
        self._files = [word for file in files for word in ("--file", str(DEPLOY / file))]
        self._project = project
        self._further_files: tuple[str, ...] = ()
        self.docker = docker.DockerClient.from_env(environment=self._environment)

    def compose(self, *arguments: str, files: tuple[str, ...] = ()) -> str:
        """Runs docker compose to its end, with further files; returns what it printed, and asserts that it could."""
        self._further_files = tuple(dict.fromkeys((*self._further_files, *files)))
        more = [word for file in files for word in ("--file", str(DEPLOY / file))]
        done = subprocess.run(
            ["docker", "compose", "--project-name", self._project, *self._files, *more, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_DEADLINE_S,
        )
        assert done.returncode == 0, f"docker compose {' '.join(arguments)}:\n{done.stdout}{done.stderr}"[-4000:]
        return done.stdout

    def container(self, service: str) -> Container:
        """The service's one container, as it is now."""
        (container,) = self.docker.containers.list(
            all=True,
            filters={
                "label": [
                    f"com.docker.compose.project={self._project}",
                    f"com.docker.compose.service={service}",
                    "com.docker.compose.oneoff=False",
                ]
            },
        )
        return container

    def inside(self, service: str, *command: str) -> str:
        """Runs a command in the service's container; returns what it printed."""
        status, output = self.container(service).exec_run(list(command))
        assert status == 0, f"{service}: {' '.join(command)}: {output.decode()}"
        return str(output.decode())

    def python(self, service: str, code: str) -> str:
        """The same for a piece of Python."""
        return self.inside(service, "python", "-c", code)

    @contextmanager
    def healing(self, service: str) -> Iterator[None]:
        """What is done within ends the service's process; leaves when its container has died and is healthy again."""
        container = self.container(service)
        before_unix_s = time.time()  # the engine's events are asked for by the wall clock
        yield
        self._wait_for(container, before_unix_s, ["die", "health_status: healthy"])

    def _wait_for(self, container: Container, since_unix_s: float, actions: list[str]) -> None:
        events = self.docker.events(
            since=f"{since_unix_s:.6f}",
            until=f"{since_unix_s + _HEAL_DEADLINE_S:.6f}",
            filters={"container": container.id, "type": "container"},
            decode=True,
        )
        waited_for = list(actions)
        try:
            for event in events:
                if event["Action"] == waited_for[0]:
                    waited_for.pop(0)
                if not waited_for:
                    return
        finally:
            events.close()
        log = container.logs(tail=30).decode()
        raise AssertionError(f"{container.name}: no {waited_for[0]} within {_HEAL_DEADLINE_S} s:\n{log}")

    def kill(self, service: str) -> None:
        """SIGKILL to the service's process, as a crash: a kill by the engine would count as an operator's stop."""
        self.container(service).exec_run(["python", "-c", _KILL_SERVICE])

    def endpoint(self, port: int) -> str:
        """Where a port of the compute node is published."""
        return self.compose("port", "compute-node", str(port)).strip()

    def client(self) -> Client:
        """From outside of all containers; tells failures at once."""
        return Client(self.endpoint(50051), RetryPolicy(max_attempts=1))

    @contextmanager
    def http_client(self) -> Iterator[openai.OpenAI]:
        """OpenAI's own, from outside of all containers; tells failures at once."""
        url = f"http://{self.endpoint(8080)}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120.0) as client:
            yield client

    def answer(self, max_tokens: int = 16, ignore_eos: bool = False) -> str:
        """The likeliest answer to the prompt, which is always the same."""
        with self.client() as client:
            return client.complete(
                PROMPT, max_tokens=max_tokens, temperature=0.0, ignore_eos=ignore_eos, deadline_s=120.0
            ).text

    def close(self) -> None:
        """Takes everything down, volumes too, and the networks of every file that was used."""
        try:
            down = ("--profile", "tools", "down", "--volumes", "--remove-orphans")
            self.compose(*down, files=self._further_files)
        finally:
            self.docker.close()


def wheels_folder(environment: Mapping[str, str]) -> Path:
    """Where this machine's pip finds wheels first, or deploy's own folder: torch's CPU build comes from there."""
    named = [Path(word) for word in environment.get("PIP_FIND_LINKS", "").split()]
    return next((folder for folder in named if folder.is_dir()), DEPLOY / "wheels")
