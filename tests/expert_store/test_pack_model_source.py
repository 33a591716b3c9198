"""Hub models: what each failure of the hub tells a person, and that a config is judged before weights are fetched."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from expert_store.pack import model_source
from expert_store.pack.model_source import find_checkpoint
from promoe.errors import ModelNotFound, ModelUnsupported, PromoeError, ResourceExhausted
from tests.families import save_tiny_checkpoint


class Hub:
    """Stands for the hub behind `snapshot_download`: a folder, or an error; remembers what was asked for."""

    def __init__(self, content: Path | Exception, mirror: Path) -> None:
        self._content = content
        self._mirror = mirror
        self.asked: list[list[str]] = []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        assert repo_id == "owner/name"
        self.asked.append(allow_patterns)
        if isinstance(self._content, Exception):
            raise self._content
        self._mirror.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in self._content.glob(pattern):
                shutil.copyfile(path, self._mirror / path.name)
        return str(self._mirror)


def without_response(kind: type[GatedRepoError]) -> GatedRepoError:
    """Hub errors want a response of the HTTP library; their text does not."""
    error = kind.__new__(kind)
    Exception.__init__(error, "403 Client Error")
    return error


def connect(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Hub:
    monkeypatch.setattr(model_source, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize(
    ("failure", "error", "said"),
    [
        (without_response(GatedRepoError), ModelNotFound, "is gated: accept its terms"),
        (LocalEntryNotFoundError("no route\nmore"), ModelNotFound, r"cannot be reached \(no route\)"),
        (OfflineModeIsEnabled("offline"), ModelNotFound, r"cannot be reached \(offline\)"),
        (ConnectionError(), ModelNotFound, r"cannot be reached \(ConnectionError\)"),
        (HFValidationError("bad"), ModelNotFound, "the hub has no model of that name"),
        (OSError(errno.ENOSPC, "No space left"), ResourceExhausted, "disk of the hub cache is full"),
    ],
)
def test_what_the_hub_says(
    failure: Exception, error: type[PromoeError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(monkeypatch, Hub(failure, tmp_path))
    with pytest.raises(error, match=said):
        find_checkpoint("owner/name")


def test_a_hub_model_is_found_with_its_small_files_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_checkpoint("mixtral", tmp_path / "source", torch.bfloat16, sharded=True)
    (source / "consolidated.safetensors").write_bytes(b"the same weights again")
    hub = connect(monkeypatch, Hub(source, tmp_path / "mirror"))
    checkpoint = find_checkpoint("owner/name")
    assert checkpoint.name == "owner/name"
    assert checkpoint.folder == tmp_path / "mirror"
    assert [any("safetensors" in pattern for pattern in asked) for asked in hub.asked] == [False, True]
    assert not (tmp_path / "mirror" / "consolidated.safetensors").exists()
    assert (tmp_path / "mirror" / "tokenizer.json").is_file()


def test_shards_may_be_numbered_behind_their_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny_checkpoint("mixtral", tmp_path / "source", torch.bfloat16, sharded=True)
    for shard in source.glob("model-*-of-*.safetensors"):
        shard.rename(source / f"model.safetensors-{shard.stem.removeprefix('model-')}.safetensors")
    index = source / "model.safetensors.index.json"
    index.write_text(
        re.sub(r'"model-([-0-9of]+)\.safetensors"', r'"model.safetensors-\1.safetensors"', index.read_text())
    )
    connect(monkeypatch, Hub(source, tmp_path / "mirror"))
    assert len(find_checkpoint("owner/name").files) > 1


def test_a_refused_config_spares_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps({"model_type": "martian_moe"}))
    hub = connect(monkeypatch, Hub(tmp_path / "source", tmp_path / "mirror"))
    with pytest.raises(ModelUnsupported, match="unknown to Transformers"):
        find_checkpoint("owner/name")
    assert len(hub.asked) == 1


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_checkpoint("mixtral", tmp_path / "owner" / "name", torch.bfloat16)
    hub = connect(monkeypatch, Hub(ConnectionError(), tmp_path))
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("owner/name").folder == tmp_path / "owner" / "name"
    assert hub.asked == []
