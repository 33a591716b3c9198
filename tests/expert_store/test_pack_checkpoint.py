"""Reading a checkpoint's files: what is whole is described exactly, what is not is refused before a weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expert_store.pack.checkpoint import Checkpoint
from promoe.errors import ModelNotFound, ModelUnsupported, PackDamaged, PromoeError
from tests.families import save_tiny_checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"), torch.bfloat16, sharded=True)


@pytest.fixture
def broken(sharded: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sharded, tmp_path / "broken"))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_the_headers_say_where_each_tensor_lies(sharded: Path) -> None:
    checkpoint = Checkpoint.read("tiny", sharded)
    expected = {name: tensor for file in sharded.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert checkpoint.tensors.keys() == expected.keys()
    with checkpoint.open() as read:
        for name, stored in checkpoint.tensors.items():
            assert torch.equal(read(name), expected[name])
            assert stored.shape == tuple(expected[name].shape)
            raw = stored.file.read_bytes()[stored.begin : stored.end]
            assert raw == expected[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())


def test_the_same_files_have_the_same_fingerprint_and_others_another(sharded: Path, broken: Path) -> None:
    before = Checkpoint.read("a", sharded).fingerprint
    assert Checkpoint.read("b", sharded).fingerprint == before
    shard = first_shard(broken)
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert Checkpoint.read("a", broken).fingerprint != before


def cut_off(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])


def cut_to_nothing(folder: Path) -> None:
    first_shard(folder).write_bytes(b"abc")


def grown(folder: Path) -> None:
    with first_shard(folder).open("ab") as stream:
        stream.write(b"x")


def garbage_header(folder: Path) -> None:
    shard = first_shard(folder)
    content = bytearray(shard.read_bytes())
    content[8:16] = b"\xff" * 8
    shard.write_bytes(content)


def absurd_header_length(folder: Path) -> None:
    shard = first_shard(folder)
    content = bytearray(shard.read_bytes())
    content[:8] = b"\xff" * 8
    shard.write_bytes(content)


def header_of_other_shape(folder: Path) -> None:
    shard = first_shard(folder)
    header = b'{"a": {"dtype": "F32"}}'
    shard.write_bytes(len(header).to_bytes(8, "little") + header)


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def listed_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}}')


def index_with_a_tensor_too_many(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.ghost"] = first_shard(folder).name
    path.write_text(json.dumps(index))


def lost_shard(folder: Path) -> None:
    first_shard(folder).unlink()


def lost_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def lost_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def eight_bit_tensor(folder: Path) -> None:
    shard = first_shard(folder)
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (cut_off, PackDamaged, "bytes where its header promises"),
        (cut_to_nothing, PackDamaged, "cut off or not a safetensors file"),
        (grown, PackDamaged, "bytes where its header promises"),
        (garbage_header, PackDamaged, "damaged safetensors header"),
        (absurd_header_length, PackDamaged, "cut off or not a safetensors file"),
        (header_of_other_shape, PackDamaged, "damaged safetensors header"),
        (bad_config, PackDamaged, "not valid JSON"),
        (listed_config, PackDamaged, "not hold a JSON object"),
        (bad_index, PackDamaged, "cannot be read as a weight index"),
        (index_with_a_tensor_too_many, PackDamaged, "model.layers.0.ghost"),
        (lost_shard, ModelNotFound, "lacks 1 of its"),
        (lost_index, ModelNotFound, "no model.safetensors.index.json"),
        (lost_config, ModelNotFound, "no config.json"),
        (only_pickles, ModelUnsupported, "not as safetensors"),
        (no_weights, ModelNotFound, "holds no weights"),
        (eight_bit_tensor, ModelUnsupported, "stored as F8_E4M3"),
    ],
)
def test_what_is_not_whole_is_refused(
    broken: Path, damage: Callable[[Path], None], error: type[PromoeError], said: str
) -> None:
    damage(broken)
    with pytest.raises(error, match=said):
        Checkpoint.read("broken", broken)
