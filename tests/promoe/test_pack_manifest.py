"""A manifest is read as it was written, or refused as damaged: there is no third outcome."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.errors import ModelNotFound, PackDamaged
from promoe.ids import ExpertId
from promoe.model_spec import ExpertLayout
from promoe.pack_manifest import MANIFEST_FILE, PACK_VERSION, PackManifest, layer_file
from tests.promoe.specs import LAYOUTS, manifest_of, small_spec

MANIFEST = manifest_of(small_spec())


@pytest.fixture(scope="module")
def pack_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for manifests, reused by hypothesis' examples."""
    return tmp_path_factory.mktemp("pack")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a good manifest."""
    folder = tmp_path_factory.mktemp("good_pack")
    MANIFEST.write(folder)
    return (folder / MANIFEST_FILE).read_text()


def outcome(pack_dir: Path, content: bytes) -> PackManifest | None:
    """The manifest that is read from these bytes, or None if it is refused as damaged."""
    (pack_dir / MANIFEST_FILE).write_bytes(content)
    try:
        return PackManifest.read(pack_dir)
    except PackDamaged:
        return None


@given(LAYOUTS, st.integers(1, 4), st.integers(1, 5))
def test_is_read_as_it_was_written(pack_dir: Path, layout: ExpertLayout, num_moe_layers: int, num_experts: int) -> None:
    manifest = manifest_of(replace(small_spec(num_moe_layers, num_experts), layout=layout))
    manifest.write(pack_dir)
    assert PackManifest.read(pack_dir) == manifest
    assert sorted(path.name for path in pack_dir.iterdir()) == [MANIFEST_FILE]


@given(st.data())
def test_truncated_is_damaged(pack_dir: Path, written: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(written) - 1))
    assert outcome(pack_dir, written[:length].encode()) is None


@given(st.data())
def test_a_flipped_bit_is_damage_or_changes_nothing(pack_dir: Path, written: str, data: st.DataObject) -> None:
    content = bytearray(written.encode())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert outcome(pack_dir, bytes(content)) in (None, MANIFEST)


@given(st.data())
def test_an_overwritten_stretch_is_damage_or_changes_nothing(pack_dir: Path, written: str, data: st.DataObject) -> None:
    content = bytearray(written.encode())
    start = data.draw(st.integers(0, len(content) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=40))
    content[start : start + len(patch)] = patch
    assert outcome(pack_dir, bytes(content)) in (None, MANIFEST)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["spec", "layout", "pack_version", "x"]), inner)
        ),
        max_leaves=10,
    )
)
def test_other_json_is_damage(pack_dir: Path, document: object) -> None:
    assert outcome(pack_dir, json.dumps(document).encode()) is None
    with_version = {"pack_version": PACK_VERSION, "manifest_checksum": "0", "spec": document}
    assert outcome(pack_dir, json.dumps(with_version).encode()) is None


def test_deeply_nested_json_is_damage_not_a_crash(pack_dir: Path) -> None:
    assert outcome(pack_dir, b"[" * 1_000_000) is None


def test_changed_by_hand_is_refused_although_it_parses(pack_dir: Path, written: str) -> None:
    assert '"hidden_size": 8' in written
    (pack_dir / MANIFEST_FILE).write_text(written.replace('"hidden_size": 8', '"hidden_size": 16'))
    with pytest.raises(PackDamaged, match="changed after it was written"):
        PackManifest.read(pack_dir)


def test_spacing_and_order_of_keys_do_not_matter(pack_dir: Path, written: str) -> None:
    reordered = dict(reversed(list(json.loads(written).items())))
    assert outcome(pack_dir, json.dumps(reordered).encode()) == MANIFEST


def test_another_version_says_which_one_this_promoe_reads(pack_dir: Path, written: str) -> None:
    document = json.loads(written) | {"pack_version": 99}
    (pack_dir / MANIFEST_FILE).write_text(json.dumps(document))
    with pytest.raises(PackDamaged, match=rf"version 99; this promoe reads {PACK_VERSION}.*promoe pack"):
        PackManifest.read(pack_dir)


def test_no_folder_and_half_a_pack_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no folder"):
        PackManifest.read(tmp_path / "missing")
    with pytest.raises(PackDamaged, match="not a finished pack"):
        PackManifest.read(tmp_path)


def test_as_many_checksums_and_modules_as_the_model_has(pack_dir: Path) -> None:
    short_layer = replace(MANIFEST, blob_checksums=(MANIFEST.blob_checksums[0], MANIFEST.blob_checksums[1][:-1]))
    short_modules = replace(MANIFEST, layer_modules=MANIFEST.layer_modules[:-1])
    for manifest, sentence in ((short_layer, r"lists \[3, 2\] checksums.*\[3, 3\]"), (short_modules, "names 1 of 2")):
        manifest.write(pack_dir)
        with pytest.raises(PackDamaged, match=sentence):
            PackManifest.read(pack_dir)


def test_writing_leaves_the_old_manifest_until_the_new_one_is_complete(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    old = (tmp_path / MANIFEST_FILE).stat().st_ino
    replace(MANIFEST, packed_with={"promoe": "9"}).write(tmp_path)
    assert (tmp_path / MANIFEST_FILE).stat().st_ino != old
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_an_experts_checksum_is_found_by_layer_then_expert() -> None:
    assert MANIFEST.checksum_of(ExpertId(layer=1, expert=2)) == 1002


def test_layer_files_sort_by_layer() -> None:
    files = [layer_file(Path("pack"), layer) for layer in (0, 2, 10, 99_999)]
    assert files == sorted(files)
    assert files[0] == Path("pack/experts/layer_00000.bin")
