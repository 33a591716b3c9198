"""Conversion in pieces against conversion as a whole, and the plan that decides what becomes what."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_store.pack import meta_model
from expert_store.pack.checkpoint import Checkpoint
from expert_store.pack.meta_model import ConversionUnit, MetaModel, load_config
from promoe.errors import ModelUnsupported
from promoe.model_spec import Dtype
from tests.expert_store.pack_oracle import assert_same_bits
from tests.families import FAMILIES, NUM_EXPERTS, save_tiny_checkpoint


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = save_tiny_checkpoint(request.param, tmp_path_factory.mktemp("models") / "tiny", torch.float32)
    return Checkpoint.read("tiny", folder)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> MetaModel:
    return MetaModel(load_config(checkpoint.folder), Dtype.BFLOAT16)


@pytest.mark.parametrize("experts_per_piece", [1, 3, NUM_EXPERTS])
def test_pieces_make_what_the_whole_conversion_makes(
    checkpoint: Checkpoint, model: MetaModel, experts_per_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert_nbytes = sum(math.prod(shape) for shape in model.experts[0].shapes.values()) * 2
    monkeypatch.setattr(meta_model, "_PIECE_NBYTES", expert_nbytes * experts_per_piece)
    plan = model.plan(checkpoint.tensors)
    with checkpoint.open() as read:
        for units in plan.layers:
            whole = {name: tensor for unit in units for name, tensor in model.convert(unit, read).items()}
            seen: list[int] = []
            for first, piece in model.convert_layer(units, read):
                assert piece.keys() == whole.keys()
                for name, tensor in piece.items():
                    assert len(tensor) <= experts_per_piece
                    assert_same_bits(tensor, whole[name][first : first + len(tensor)], name)
                seen += range(first, first + len(next(iter(piece.values()))))
            assert seen == list(range(NUM_EXPERTS)), "every expert once, in order"


def test_what_no_converter_takes_apart_is_cut_after_conversion(
    checkpoint: Checkpoint, model: MetaModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meta_model, "_PIECE_NBYTES", 1)
    plan = model.plan(checkpoint.tensors)
    with checkpoint.open() as read:
        in_pieces = list(model.convert_layer(plan.layers[0], read))
        monkeypatch.setattr(meta_model, "_is_expert_by_expert", lambda converter: False)
        cut_later = list(model.convert_layer(plan.layers[0], read))
    assert [first for first, _ in in_pieces] == [first for first, _ in cut_later] == list(range(NUM_EXPERTS))
    for (_, left), (_, right) in zip(in_pieces, cut_later, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert_same_bits(left[name], right[name], name)


def test_the_plan_makes_each_tensor_of_the_model_once(checkpoint: Checkpoint, model: MetaModel) -> None:
    plan = model.plan(checkpoint.tensors)
    units = [*plan.dense, *(unit for layer in plan.layers for unit in layer)]
    made = [target for unit in units for target in unit.targets]
    used = [key for unit in units for key in unit.sources]
    assert sorted(made) == sorted(model.state_names)
    assert sorted([*used, *plan.ignored]) == sorted(checkpoint.tensors)
    for layer, experts in zip(plan.layers, model.experts, strict=True):
        assert {target for unit in layer for target in unit.targets} == {experts.target(p) for p in experts.shapes}


def test_the_order_of_the_checkpoint_does_not_matter(checkpoint: Checkpoint, model: MetaModel) -> None:
    assert model.plan(reversed(list(checkpoint.tensors))) == model.plan(checkpoint.tensors)


def test_converting_leaves_no_weights_in_the_model(checkpoint: Checkpoint, model: MetaModel) -> None:
    plan = model.plan(checkpoint.tensors)
    with checkpoint.open() as read:
        for unit in (*plan.dense, *plan.layers[0]):
            model.convert(unit, read)
    assert {tensor.device.type for tensor in model.module("").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_the_modules_own(family: str, tmp_path: Path) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    model = MetaModel(load_config(tmp_path), Dtype.FLOAT16)
    layout = model.layout()
    for experts in model.experts:
        parameters = dict(model.module(experts.name).named_parameters(recurse=False))
        assert [slot.name for slot in layout.tensors] == [n for n in parameters if n in experts.shapes]
        for slot in layout.tensors:
            assert parameters[slot.name].shape == (NUM_EXPERTS, *slot.shape)
            assert slot.offset % 64 == 0


def test_layers_with_other_experts_are_refused(tmp_path: Path) -> None:
    FAMILIES["mixtral"]().save_pretrained(tmp_path)
    model = MetaModel(load_config(tmp_path), Dtype.FLOAT32)
    first, *others = model.experts
    widened = {name: (*shape[:-1], shape[-1] + 1) for name, shape in first.shapes.items()}
    model.experts = (first, meta_model.ExpertsModule("odd", first.num_experts, widened), *others)
    with pytest.raises(ModelUnsupported, match=r"odd .* differ from those of"):
        model.layout()


@settings(max_examples=50, deadline=None)
@given(num_experts=st.integers(1, 9), num_patterns=st.integers(1, 3), data=st.data())
def test_part_of_a_unit_has_the_chosen_experts_of_each_pattern(
    num_experts: int, num_patterns: int, data: st.DataObject
) -> None:
    entries = [(f"{expert}.p{n}", f"p{n}") for expert in range(num_experts) for n in range(num_patterns)]
    unit = ConversionUnit(tuple(k for k, _ in entries), tuple(p for _, p in entries), ("fused",))
    first = data.draw(st.integers(0, num_experts - 1))
    chosen = range(first, data.draw(st.integers(first + 1, num_experts)))
    part = unit.of_experts(chosen, num_experts)
    assert part.targets == unit.targets
    for n in range(num_patterns):
        sources = [key for key, taken in zip(part.sources, part.patterns, strict=True) if taken == f"p{n}"]
        assert sources == [f"{expert}.p{n}" for expert in chosen]
    assert len(part.sources) == len(chosen) * num_patterns
