"""An installed predictor plug-in as the import system sees one: a module and its metadata with entry points."""

import os
from collections.abc import Mapping
from pathlib import Path

ECHO_PLUGIN = '''
import time
import numpy as np
from promoe.hint import Hint, ObservedKind, PredictorVersion


class Echo:
    """Hints expert 0 for the observed layer itself; `num_expected` is the step's number of tokens."""

    def __init__(self, source):
        self.version = PredictorVersion("echo@7", "echo", ObservedKind.NONE, (0,), False, True)

    def open_session(self):
        return self

    def begin_step(self, start):
        self.start = start

    def observe(self, observation):
        ids, scores = np.zeros(1, np.uint16), np.ones(1, np.float32)
        step, layer = observation.step, observation.layer
        return [Hint(step, layer, step, layer, ids, scores, observation.num_tokens, self.version.version)]

    def end_requests(self, request_ids):
        if "poison" in request_ids:
            raise ValueError("a bug of the plug-in")


class Slow(Echo):
    def observe(self, observation):
        time.sleep(0.02)
        return super().observe(observation)


class Hanging(Echo):
    def observe(self, observation):
        time.sleep(1e6)


class Failing(Echo):
    def observe(self, observation):
        if observation.layer == 2:
            raise ZeroDivisionError("a bug of the plug-in")
        return super().observe(observation)


def failing_factory(source):
    raise RuntimeError("cannot even be made")
'''

ENTRY_POINTS = """[promoe.predictors]
echo = echo_plugin:Echo
slow = echo_plugin:Slow
hanging = echo_plugin:Hanging
failing = echo_plugin:Failing
unmade = echo_plugin:failing_factory
lost = no_such_module:Echo
"""


def install_plugins(folder: Path) -> Path:
    """Writes the plug-ins of a distribution into a folder for the import path; returns it."""
    metadata = folder / "echo_plugin-7.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "echo_plugin.py").write_text(ECHO_PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-plugin\nVersion: 7.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def environment_with(folder: Path) -> Mapping[str, str]:
    """For a process that has the folder on its import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
