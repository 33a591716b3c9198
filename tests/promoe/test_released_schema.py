"""What was released is kept: each record can be spoken, and a change that would break its peers is noticed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from promoe.schema import OUR_SCHEMA, Schema
from tests.promoe.released_schema import RELEASED, ReleasedSchema

ROOT = RELEASED.parents[1]
BUF = Path(sys.executable).parent / "buf"
VERSIONS = sorted(path.stem for path in RELEASED.glob("*.binpb"))


def breaking(folder: Path, against: Path) -> "subprocess.CompletedProcess[str]":
    """`buf breaking` as `make check` runs it, over the protos of a folder."""
    return subprocess.run(
        [BUF, "breaking", str(folder), "--against", str(against)], capture_output=True, text=True, check=False
    )


def copied_protos(folder: Path) -> Path:
    shutil.copy(ROOT / "buf.yaml", folder)
    shutil.copytree(ROOT / "proto", folder / "proto", ignore=lambda _, names: [n for n in names if n.endswith("py")])
    return folder / "proto/promoe/v1"


def test_the_older_neighbour_is_recorded() -> None:
    assert str(Schema(OUR_SCHEMA.major, max(0, OUR_SCHEMA.minor - 1))) in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_record_is_a_version_that_we_may_meet(version: str) -> None:
    schema = Schema.parse(version)
    assert schema is not None
    assert schema <= OUR_SCHEMA
    assert "schema_version" in ReleasedSchema(version).message("ServiceInfo").DESCRIPTOR.fields_by_name


@pytest.mark.parametrize(
    ("file", "line", "instead"),
    [
        ("predictor.proto", "  uint32 num_expected = 7;\n", ""),
        ("predictor.proto", "  uint64 observed_step = 4;\n", "  string observed_step = 4;\n"),
        ("model.proto", "  string fingerprint = 3;\n", "  string fingerprint = 33;\n"),
    ],
)
def test_what_would_break_an_older_peer_is_noticed(tmp_path: Path, file: str, line: str, instead: str) -> None:
    protos = copied_protos(tmp_path)
    text = (protos / file).read_text()
    assert line in text
    (protos / file).write_text(text.replace(line, instead))
    done = breaking(tmp_path, RELEASED / "1.0.binpb")
    assert done.returncode != 0
    assert file in done.stdout
