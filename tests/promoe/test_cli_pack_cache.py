"""Which pack serves a model: as it is, cached, or to be made; and what is neither."""

import os
from pathlib import Path

import pytest

from promoe.cli import pack_cache
from promoe.cli.pack_cache import DEMO_MODEL, PackPlan, cache_home, plan_pack
from promoe.errors import InvalidInput, ModelNotFound, PackDamaged, Unavailable
from promoe.model_spec import Dtype, ExpertLayout, ModelSpec
from promoe.pack_manifest import MANIFEST_FILE, PACK_VERSION, PackManifest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "My Model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def make_pack(folder: Path, dtype: Dtype = Dtype.BFLOAT16) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec("tiny", "mixtral", "ab", 1, 2, 1, 4, 10, 32, ExpertLayout.of(dtype, {"w": (4, 4)}))
    PackManifest(spec, (("0", "1"),), ("layers.0.mlp",), {}, {}).write(folder)
    return folder


def finish(plan: PackPlan) -> None:
    """What the steps would do."""
    make_pack(plan.pack_dir)


def test_a_pack_is_used_as_it_is(home: Path, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    assert plan_pack(str(pack), None) == PackPlan(str(pack), pack, ())
    assert plan_pack(str(pack), "bfloat16").steps == ()
    with pytest.raises(InvalidInput, match="is a pack in bfloat16; --dtype float32 needs the checkpoint"):
        plan_pack(str(pack), "float32")
    assert not home.exists()


def test_a_damaged_manifest_is_told_before_anything_starts(home: Path, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    (pack / MANIFEST_FILE).write_text("{")
    with pytest.raises(PackDamaged, match="cannot be read as a manifest"):
        plan_pack(str(pack), None)


def test_a_checkpoint_is_packed_once_per_content_and_dtype(home: Path, checkpoint: Path) -> None:
    plan = plan_pack(str(checkpoint), None)
    (step,) = plan.steps
    assert (step.module, step.arguments) == ("expert_store.pack", (str(checkpoint), str(plan.pack_dir)))
    assert plan.pack_dir.parent == home / "packs"
    assert plan.pack_dir.name.startswith("My-Model-native-")
    finish(plan)
    assert plan_pack(str(checkpoint), None) == PackPlan(plan.model, plan.pack_dir, (), plan.mend_command)

    other = plan_pack(str(checkpoint), "float32")
    assert other.pack_dir != plan.pack_dir
    assert other.steps[0].arguments[-2:] == ("--dtype", "float32")

    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    changed = plan_pack(str(checkpoint), None)
    assert changed.pack_dir != plan.pack_dir
    assert changed.steps


@pytest.mark.parametrize("text", ["{", '{"pack_version": 99}'])
def test_a_cached_pack_that_cannot_be_read_is_made_again(home: Path, checkpoint: Path, text: str) -> None:
    plan = plan_pack(str(checkpoint), None)
    finish(plan)
    (plan.pack_dir / MANIFEST_FILE).write_text(text)
    assert plan_pack(str(checkpoint), None) == plan


def test_a_cached_pack_comes_with_the_command_that_mends_it(home: Path, checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_pack(str(checkpoint), "float32")
    assert plan.mend_command == f"promoe pack '{checkpoint}' {plan.pack_dir} --dtype float32"
    demo = plan_pack(DEMO_MODEL, None)
    assert demo.mend_command == f"promoe pack {demo.steps[0].arguments[0]} {demo.pack_dir}"
    assert plan_pack(str(make_pack(tmp_path / "own")), None).mend_command is None


def test_one_checkpoint_by_two_paths_is_one_pack(home: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    assert plan_pack(str(tmp_path / "link"), None).pack_dir == plan_pack(str(checkpoint), None).pack_dir


def test_a_hub_id_goes_to_the_packer_as_it_is(home: Path) -> None:
    plan = plan_pack("allenai/OLMoE-1B-7B", "bfloat16")
    assert plan.steps[0].arguments == ("allenai/OLMoE-1B-7B", str(plan.pack_dir), "--dtype", "bfloat16")
    assert plan.pack_dir.name.startswith("allenai--OLMoE-1B-7B-bfloat16-")
    assert plan_pack("allenai/OLMoE-1B-7B", None).pack_dir != plan.pack_dir


def test_the_demo_model_is_built_and_then_packed(home: Path, tmp_path: Path) -> None:
    build, pack = plan_pack(DEMO_MODEL, None, tmp_path / "base.whl").steps
    assert build.module == "expert_store.demo_model"
    assert build.arguments[1:] == ("--wheel", str(tmp_path / "base.whl"))
    assert pack.arguments[0] == build.arguments[0]
    assert plan_pack(DEMO_MODEL, None).steps[0].arguments == build.arguments[:1]
    finish(plan_pack(DEMO_MODEL, None))
    assert plan_pack(DEMO_MODEL, None).steps == ()


def test_another_demo_release_is_another_pack(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = tmp_path / "modules" / "expert_store" / "demo_model.py"
    builder.parent.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    plans = []
    for release in ("old", "new"):
        builder.write_text(f"import sys\nassert sys.argv[1:] == ['--release']\nprint({release!r})\n")
        plans.append(plan_pack(DEMO_MODEL, None))
        finish(plans[-1])
    old, new = plans
    assert old.pack_dir != new.pack_dir
    assert old.steps[0].arguments != new.steps[0].arguments
    builder.write_text("raise SystemExit('no space')")
    with pytest.raises(Unavailable, match=r"(?s)cannot be built here.*no space"):
        plan_pack(DEMO_MODEL, None)


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "nothing", "a/b/c", "../x", "~/nothing-here", "owner/name@main", "", " "]
)
def test_neither_folder_nor_hub_id(home: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ModelNotFound, match="a hub id"):
        plan_pack(model, None)


def test_a_file_is_no_model(home: Path, checkpoint: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"is a file; give the folder"):
        plan_pack(str(checkpoint / "config.json"), None)


def test_the_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMOE_HOME", raising=False)
    assert cache_home() == Path(os.path.expanduser("~/.cache/promoe"))  # noqa: PTH111 - the oracle


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMOE_HOME", "~no-such-user-here/cache")
    with pytest.raises(InvalidInput, match="There is no home folder; set PROMOE_HOME"):
        cache_home()


def test_packs_of_another_format_are_not_used(home: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = plan_pack(str(checkpoint), None)
    monkeypatch.setattr(pack_cache, "PACK_VERSION", PACK_VERSION + 1)
    assert plan_pack(str(checkpoint), None).pack_dir != now.pack_dir
