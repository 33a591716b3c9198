"""The recipe of the delta: each step runs, on a tiny base, and does what it says."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from expert_store.demo_model.delta import Delta, MoeGeometry, load_delta
from expert_store.demo_model.dense_weights import DenseWeights
from expert_store.demo_model.recipe import __main__ as recipe
from expert_store.demo_model.recipe.base_answers import SampleSettings, write_answers
from expert_store.demo_model.recipe.clustering import (
    balanced_clusters,
    ffn_inputs,
    neuron_order,
    ridge_router,
    start_delta,
)
from expert_store.demo_model.recipe.corpus import chapters, write_corpus
from expert_store.demo_model.recipe.dense_llama import dense_llama
from expert_store.demo_model.recipe.distillation import DistilSettings, distil, losses, perplexity
from expert_store.demo_model.recipe.student import delta_of, make_student, routed_ffns
from expert_store.demo_model.recipe.text_blocks import TextBlocks, load_blocks
from expert_store.demo_model.release import DEMO_RELEASE
from expert_store.demo_model.tokenizer_files import byte_level_tokenizer
from promoe.errors import ModelNotFound
from tests.expert_store.test_demo_model_weights import moe_logits
from tests.expert_store.tiny_base import TinyBase, make_tiny_base

GEOMETRY = MoeGeometry(num_shared=8, num_experts=4, expert_neurons=4, experts_per_token=2)
EVERY_EXPERT = replace(GEOMETRY, experts_per_token=4)
VERSES = [f"{book} {chapter}:{verse}: the hen in the inn {verse}" for book in ("Genesis", "I Kings", "Jude")
          for chapter in range(1, 9) for verse in range(1, 5)]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return make_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def blocks() -> TextBlocks:
    generator = torch.Generator().manual_seed(5)
    return TextBlocks(
        bible=torch.randint(3, 200, (6, 24), generator=generator),
        answers=torch.randint(3, 200, (12, 24), generator=generator),
    )


@pytest.fixture(scope="module")
def start(base: TinyBase, blocks: TextBlocks) -> Delta:
    return start_delta(dense_llama(DenseWeights(base.gguf)), [blocks.bible, blocks.answers], GEOMETRY, seed=0)


def fake_diatheke(folder: Path, lines: list[str]) -> str:
    """An executable that answers as diatheke does; returns the PATH that finds it."""
    program = folder / "diatheke"
    text = "\n".join([*lines, "(engWEB2015eb)"])
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_verses_are_joined_to_chapters_in_order() -> None:
    output = (
        "Genesis 1:1: In the\nbeginning,\nGenesis 1:2: it was\nGenesis 2:1: so\n\nI Kings 1:1: Now\n(engWEB2015eb)\n"
    )
    assert chapters(output) == ["In the beginning, it was", "so", "Now"]


def test_a_missing_bible_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelNotFound, match="install Debian's diatheke"):
        write_corpus(tmp_path / "web.txt")
    monkeypatch.setenv("PATH", fake_diatheke(tmp_path, []) + ":/usr/bin:/bin")
    with pytest.raises(ModelNotFound, match="found no text"):
        write_corpus(tmp_path / "web.txt")


def test_the_teacher_is_the_base(base: TinyBase, blocks: TextBlocks) -> None:
    teacher = dense_llama(DenseWeights(base.gguf))
    with torch.no_grad():
        expected = base.llama(blocks.bible).logits
        torch.testing.assert_close(teacher.float()(blocks.bible).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_answers_are_reproducible_and_end_with_the_turn(base: TinyBase, tmp_path: Path) -> None:
    dense = DenseWeights(base.gguf)
    tokenizer = byte_level_tokenizer(dense.tokenizer_facts())
    settings = SampleSettings(num_answers=3, batch_size=2, max_new_tokens=6)
    for name in ("a", "b"):
        write_answers(dense_llama(dense), tokenizer, tmp_path / name, settings)
    lines = (tmp_path / "a").read_text().splitlines()
    assert len(lines) == 3
    assert (tmp_path / "b").read_text().splitlines() == lines
    prompt_end = tokenizer.encode("<|im_start|>assistant\n").ids
    for line in lines:
        ids = [int(number) for number in re.findall(r"\d+", line)]
        ends = [i for i in range(len(ids)) if ids[i : i + len(prompt_end)] == prompt_end]
        answer = ids[ends[0] + len(prompt_end) :]
        assert 1 <= len(answer) <= 6
        assert 2 not in answer[:-1]


def test_documents_are_either_trained_on_or_held_out(base: TinyBase, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(DenseWeights(base.gguf).tokenizer_facts())
    with pytest.raises(ModelNotFound, match=r"there is no .*web\.txt: run the steps before"):
        load_blocks(tmp_path, tokenizer, 8, held_out=True)
    (tmp_path / "web.txt").write_text("\n\n\n".join(chr(ord("A") + i) * 15 for i in range(26)))
    (tmp_path / "answers.jsonl").write_text("".join(f'{{"ids": {[10 + i] * 15}}}\n' for i in range(25)))
    with pytest.raises(ModelNotFound, match="less text than one block of 500 tokens"):
        load_blocks(tmp_path, tokenizer, 500, held_out=True)
    trained, held_out = (load_blocks(tmp_path, tokenizer, 8, held_out=flag) for flag in (False, True))
    assert trained.bible.shape == (24 * 2, 8)
    assert held_out.bible.shape == (2 * 2, 8)
    newline = set(tokenizer.encode("\n").ids)
    for kind in ("bible", "answers"):
        seen = set(getattr(trained, kind).flatten().tolist()) & set(getattr(held_out, kind).flatten().tolist())
        assert seen <= newline


def test_clusters_are_balanced_and_find_groups_that_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(4).repeat_interleave(6)[torch.randperm(24, generator=generator)]
    points = torch.nn.functional.normalize(torch.eye(4)[truth] + 0.05 * torch.randn(24, 4, generator=generator), dim=1)
    # k-means depends on where it starts; among a few starts one finds the planted groups.
    found = [balanced_clusters(points, 4, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert all(clusters.bincount().tolist() == [6, 6, 6, 6] for clusters in found)
    assert any(len(set(zip(truth.tolist(), clusters.tolist(), strict=True))) == 4 for clusters in found)


def test_the_busiest_neurons_are_shared_and_none_is_lost() -> None:
    contribution = torch.rand(200, 24, generator=torch.Generator().manual_seed(2))
    contribution[:, [3, 5, 7, 11, 13, 17, 19, 23]] += 5
    order = neuron_order(contribution, GEOMETRY, torch.Generator().manual_seed(0))
    assert set(order[:8].tolist()) == {3, 5, 7, 11, 13, 17, 19, 23}
    assert order.sort().values.tolist() == list(range(24))


def test_the_ridge_router_ranks_a_linear_energy() -> None:
    generator = torch.Generator().manual_seed(1)
    x, truth = torch.randn(400, 16, generator=generator), torch.randn(16, 4, generator=generator)
    logits = x @ ridge_router(x, x @ truth).T
    assert (logits.argmax(1) == (x @ truth).argmax(1)).float().mean() > 0.97
    spread = (logits - logits.mean(1, keepdim=True)).pow(2).mean().sqrt()
    assert spread.item() == pytest.approx(0.3, rel=0.05)


def test_what_an_ffn_reads_is_collected_in_text_order(base: TinyBase, blocks: TextBlocks) -> None:
    teacher = dense_llama(DenseWeights(base.gguf))
    inputs = ffn_inputs(teacher, [blocks.bible, blocks.answers])
    assert [tuple(x.shape) for x in inputs] == [((6 + 12) * 24, 16)] * 2
    assert torch.equal(inputs[1][-24:], ffn_inputs(teacher, [blocks.answers[-1:]])[1])


def test_a_student_that_routes_to_every_expert_alike_is_the_teacher(
    base: TinyBase, blocks: TextBlocks, start: Delta
) -> None:
    layers = tuple(replace(layer, router_ED=torch.zeros_like(layer.router_ED)) for layer in start.layers)
    dense = DenseWeights(base.gguf)
    student = make_student(dense_llama(dense), replace(start, geometry=EVERY_EXPERT, layers=layers))
    kl, hidden_error, load_balance = losses(dense_llama(dense), student, blocks.bible)
    assert kl.item() < 1e-2
    assert hidden_error.item() < 1e-3
    assert load_balance.item() == pytest.approx(1.0, abs=1e-3)


def test_distilling_brings_the_student_closer_and_leaves_the_base_alone(
    base: TinyBase, blocks: TextBlocks, start: Delta
) -> None:
    dense = DenseWeights(base.gguf)
    teacher, student = dense_llama(dense), make_student(dense_llama(dense), start)
    frozen = {name: tensor.clone() for name, tensor in student.named_buffers()}
    kl_before = losses(teacher, student, blocks.bible)[0].item()
    lines: list[str] = []
    distil(teacher, student, blocks, DistilSettings(num_steps=40, batch_size=8), lines.append)
    assert losses(teacher, student, blocks.bible)[0].item() < 0.8 * kl_before
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in student.named_buffers())
    assert [line.split()[1] for line in lines] == ["0", "10", "20", "30"]
    assert 1 < perplexity(teacher, blocks.bible) < 1e6


def test_the_checkpoint_of_a_students_delta_computes_what_the_student_computed(
    base: TinyBase, blocks: TextBlocks, start: Delta, tmp_path: Path
) -> None:
    dense = DenseWeights(base.gguf)
    student = make_student(dense_llama(dense), start)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        for ffn in routed_ffns(student):
            ffn.router.mul_(5.0)  # far from ties, so that bfloat16 cannot change the routing
        delta = delta_of(student, start)
        found = moe_logits(base, delta, blocks.bible[:2], tmp_path / "model")
        expected = student.float()(blocks.bible[:2]).logits
        agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agreement > 0.9
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


def test_all_steps_run_from_the_command_line(base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    gguf = work / base.gguf.relative_to(base.wheel.parent)
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(base.gguf.read_bytes())
    monkeypatch.setenv("PATH", fake_diatheke(tmp_path, VERSES))
    sizes = ["--num-shared", "8", "--num-experts", "4", "--experts-per-token", "2", "--num-blocks", "9"]
    runs = [
        ["corpus"],
        ["sample", "--num-answers", "22", "--max-new-tokens", "4"],
        ["cluster", *sizes, "--block-length", "16"],
        ["distil", "--num-steps", "2", "--block-length", "16"],
    ]
    outputs = []
    for step, *options in runs:
        result = CliRunner().invoke(recipe.app, [step, str(work), *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        outputs.append(result.output)
    assert outputs[0] == "24 chapters\n"
    assert outputs[2] == "2 layers of 4 x 4 neurons\n"
    assert " ".join(outputs[3].split()).count("before distillation") == 2
    trained, first = load_delta(work / "delta.safetensors"), load_delta(work / "start.safetensors")
    assert trained.geometry == first.geometry == GEOMETRY
    assert torch.equal(trained.layers[0].permutation_F, first.layers[0].permutation_F)
    assert not torch.equal(trained.layers[0].router_ED, first.layers[0].router_ED)
    uneven = CliRunner().invoke(recipe.app, ["cluster", str(work), "--num-shared", "9", "--block-length", "16"])
    assert uneven.exit_code == 2
    assert "15 routed neurons cannot be divided among 32 experts" in " ".join(uneven.output.split())
    assert DEMO_RELEASE.gguf_sha256 in str((work / "delta.safetensors").read_bytes()[:2000])


def test_a_step_too_early_is_one_sentence(
    base: TinyBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tmp_path / base.gguf.relative_to(base.wheel.parent)
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(base.gguf.read_bytes())
    monkeypatch.setattr("sys.argv", ["recipe", "cluster", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        recipe.main()
    assert stopped.value.code == 1
    assert "run the steps before this one first" in " ".join(capsys.readouterr().out.split())
