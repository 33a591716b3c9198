"""Outlines of hub models: headers by range requests, no weight over the wire, and what the hub does not give."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, snapshot_download

from expert_store.pack.checkpoint_outline import find_outline
from expert_store.pack.footprint import footprint_of
from promoe.errors import ModelNotFound, ModelUnsupported, PackDamaged
from tests.families import save_tiny_checkpoint
from tests.local_hub import HUB_ID, LocalHub, local_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """An empty one, and an empty local cache."""
    (tmp_path / "model").mkdir()
    with local_hub(tmp_path / "model") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.mark.parametrize("sharded", [False, True])
def test_headers_come_over_the_wire_and_weights_do_not(hub: LocalHub, *, sharded: bool) -> None:
    save_tiny_checkpoint("qwen2_moe", hub.folder, torch.float32, sharded=sharded)
    # A weight file is larger than the part with the header that is asked for first.
    weights = sorted(hub.folder.glob("*.safetensors"))
    with weights[0].open("r+b") as file:
        file.truncate(weights[0].stat().st_size + (4 << 20))
    found = footprint_of(HUB_ID)
    assert 0 < hub.sent[weights[0].name] <= 100_001
    assert "tokenizer.json" not in hub.sent
    assert found.source_folder == str(constants.HF_HUB_CACHE)
    assert found.source_nbytes == sum(path.stat().st_size for path in hub.folder.iterdir())
    assert found.read_from == f"the headers of {len(weights)} files on the hub"


def test_a_hub_model_has_the_footprint_of_its_download(hub: LocalHub) -> None:
    folder = save_tiny_checkpoint("mixtral", hub.folder, torch.bfloat16)
    from_hub, from_folder = footprint_of(HUB_ID), footprint_of(str(folder))
    for name in ("dense_nbytes", "lookup_nbytes", "arena_nbytes", "pack_nbytes"):
        assert getattr(from_hub, name) == pytest.approx(getattr(from_folder, name), rel=1e-3), name
    assert from_hub.spec.layout == from_folder.spec.layout
    assert from_folder.source_nbytes == 0


def test_what_the_hub_lacks_is_said(hub: LocalHub) -> None:
    with pytest.raises(ModelNotFound, match=r"no model of that name|cannot be reached"):
        find_outline("owner/other")
    save_tiny_checkpoint("mixtral", hub.folder, torch.bfloat16)
    weights = hub.folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", 40) + b"{no header" + bytes(100))
    with pytest.raises(PackDamaged, match="damaged safetensors header"):
        find_outline(HUB_ID)
    weights.rename(hub.folder / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match="no safetensors weights"):
        find_outline(HUB_ID)


def test_a_downloaded_model_is_read_where_it_lies(hub: LocalHub) -> None:
    save_tiny_checkpoint("mixtral", hub.folder, torch.bfloat16)
    snapshot_download(HUB_ID, endpoint=hub.endpoint, cache_dir=constants.HF_HUB_CACHE)
    hub.sent.clear()
    outline = find_outline(HUB_ID)
    assert (outline.download_nbytes, outline.download_folder, hub.sent) == (0, None, {})
    assert outline.checkpoint.folder.is_dir()
