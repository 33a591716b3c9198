"""An artifact is read as it was written, or refused with a sentence that says why."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from predictor_service.artifact import (
    GROUP_COLUMNS,
    ArtifactManifest,
    quantized,
    read_artifact,
    read_manifest,
    write_artifact,
)
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from promoe.hint import ObservedKind
from tests.predictor_service.layer_events import make_spec

MANIFEST = ArtifactManifest(
    kind="learned", name="a", version="1", fingerprints=("0badcafe", "00c0ffee"), num_moe_layers=6, num_experts=8,
    experts_per_token=2, hidden_size=16, observed=ObservedKind.ROUTER_INPUT, features=("router_input",),
    lookaheads=(1, 2), training={"data": "made up", "tokens": 3}, metrics={"recall": 0.5},
)  # fmt: skip
TENSORS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(2, np.float32)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "a.safetensors", MANIFEST, TENSORS)
    return tmp_path / "a.safetensors"


def test_it_is_read_as_it_was_written(path: Path) -> None:
    artifact = read_artifact(path)
    assert artifact.manifest == read_manifest(path) == MANIFEST
    assert artifact.nbytes == path.stat().st_size
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(artifact.tensor(name, values.shape), values)


def test_writing_leaves_nothing_beside_it(path: Path) -> None:
    write_artifact(path, replace(MANIFEST, version="2"), TENSORS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert read_manifest(path).version == "2"


def test_a_write_that_fails_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_artifact(path, replace(MANIFEST, version="2"), TENSORS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert read_manifest(path).version == "1"


def test_no_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no predictor artifact at"):
        read_artifact(tmp_path / "none.safetensors")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    write_artifact(path, MANIFEST, TENSORS)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    # What is read in spite of it means the same: JSON has room for changes without meaning.
    with contextlib.suppress(InvalidInput):
        artifact = read_artifact(path)
        assert artifact.manifest == MANIFEST
        assert all(np.array_equal(artifact.tensors[name], values) for name, values in TENSORS.items())


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_cut_file_is_damaged(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(InvalidInput, match="damaged"):
        read_artifact(path)


def test_other_tensors_with_the_same_manifest_are_damaged(path: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file(TENSORS | {"bias": np.ones(2, np.float32)}, tmp_path / "b.safetensors", metadata)
    with pytest.raises(InvalidInput, match="checksum differs"):
        read_artifact(tmp_path / "b.safetensors")


def test_another_safetensors_file_is_no_artifact(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInput, match="has no manifest"):
        read_artifact(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": 99}, "of format 99"),
        ({"lookaheads": 3}, "lookaheads is no list"),
        ({"lookaheads": ["x"]}, "no integer"),
        ({"observed": "the weather"}, "weather"),
        ({"metrics": []}, "metrics is no table"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(path: Path, change: dict[str, object], sentence: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    document = json.loads(metadata["promoe.artifact"]) | change
    save_file({}, path, metadata | {"promoe.artifact": json.dumps(document)})
    with pytest.raises(InvalidInput, match=sentence):
        read_manifest(path)


def test_a_model_that_it_fits_by_any_fingerprint_is_accepted(path: Path) -> None:
    for fingerprint in MANIFEST.fingerprints:
        MANIFEST.check_model(replace(make_spec(), fingerprint=fingerprint), path)


@pytest.mark.parametrize("change", [{"fingerprint": "deadbeef"}, {"num_experts": 9}, {"hidden_size": 32}])
def test_another_model_is_refused_with_both_sides(path: Path, change: dict[str, object]) -> None:
    spec = replace(make_spec(), **change)  # type: ignore[arg-type]
    with pytest.raises(ModelMismatch) as caught:
        MANIFEST.check_model(spec, path)
    assert "0badcafe or 00c0ffee" in str(caught.value)
    assert f"fingerprint {spec.fingerprint}" in str(caught.value)


@pytest.mark.parametrize(("name", "shape"), [("weight", (3, 2)), ("other", (1,))])
def test_a_tensor_of_another_shape_is_refused(path: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=name):
        read_artifact(path).tensor(name, shape)


def test_a_tensor_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a.safetensors", MANIFEST, {"weight": np.array([np.nan], np.float32)})
    with pytest.raises(InvalidInput, match="not finite"):
        read_artifact(tmp_path / "a.safetensors").tensor("weight", (1,))


@pytest.mark.parametrize("part", [".scale", ".columns"])
def test_a_matrix_that_lacks_a_part_is_damaged(tmp_path: Path, part: str) -> None:
    stored = quantized("in.weight", np.ones((2, 40), np.float32))
    del stored[f"in.weight{part}"]
    write_artifact(tmp_path / "a.safetensors", MANIFEST, stored)
    with pytest.raises(InvalidInput, match="is damaged"):
        read_artifact(tmp_path / "a.safetensors")


@settings(max_examples=25, deadline=None)
@given(
    weight=hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=70), elements=st.floats(-100, 100, width=32)
    )
)
def test_four_bits_err_by_at_most_half_a_code(tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("artifact") / "a.safetensors"
    write_artifact(path, MANIFEST, quantized("weight", weight))
    found = read_artifact(path).tensor("weight", weight.shape)
    for first in range(0, weight.shape[-1], GROUP_COLUMNS):
        group = slice(first, first + GROUP_COLUMNS)
        largest = np.abs(weight[..., group]).max(axis=-1, keepdims=True)
        # A float16 scale is exact to 1/2048 of it, and to 2**-25 at the smallest.
        assert (np.abs(found[..., group] - weight[..., group]) <= largest * (0.5 / 7 + 1e-3) + 1e-6).all()


def test_four_bits_are_about_a_seventh(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 640)).astype(np.float32)
    stored = quantized("weight", weight)
    assert sum(array.nbytes for array in stored.values()) < weight.nbytes / 7 + 16
