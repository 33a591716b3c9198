"""What is short has a name, and each flag that is given as its mend does mend it."""

import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compute_node.memory_plan import BUDGET_SHARE, MemoryNeeds, plan_memory
from compute_node.planning.device_needs import DeviceNeeds
from compute_node.planning.planned_device import CONTEXT_NBYTES
from promoe.config import SettingUnfit
from promoe.model_spec import Dtype
from tests.compute_node.planning.plans import DENSE_NBYTES, MIB, device_needs


def mended(needs: DeviceNeeds, flag: str) -> DeviceNeeds:
    """The same with the flag."""
    name, value, *_ = flag.split(" ")
    nbytes = int(value.removesuffix("MiB")) * MIB if value.endswith("MiB") else 0
    settings: dict[str, dict[str, object]] = {
        "--cache-rate": {"cache_rate": float(value)} if name == "--cache-rate" else {},
        "--expert-slots": {"expert_slots": int(value)} if name == "--expert-slots" else {},
        "--max-context": {"max_context_tokens": int(value)} if name == "--max-context" else {},
        "--memory": {"memory_bytes": nbytes},
        "no": {"memory_bytes": None},
    }
    if name == "--gpu-memory":
        return replace(needs, free_nbytes=nbytes - CONTEXT_NBYTES, config=replace(needs.config, memory_bytes=None))
    return replace(needs, config=replace(needs.config, **settings[name]))  # type: ignore[arg-type]


@example(free_mib=0, memory_mib=1, rate=None, slots=None, context=None, is_asked_gpu=False)
@given(
    free_mib=st.integers(0, 120),
    memory_mib=st.none() | st.integers(1, 150),
    rate=st.none() | st.sampled_from([0.125, 0.5, 0.75, 1.0]),
    slots=st.none() | st.integers(1, 8),
    context=st.none() | st.integers(1, 9000),
    is_asked_gpu=st.booleans(),
)
def test_a_plan_is_the_nodes_own_and_every_mend_mends(
    free_mib: int,
    memory_mib: int | None,
    rate: float | None,
    slots: int | None,
    context: int | None,
    is_asked_gpu: bool,
) -> None:
    needs = device_needs(
        free_mib * MIB,
        is_asked_gpu=is_asked_gpu,
        memory_bytes=memory_mib and memory_mib * MIB,
        cache_rate=None if slots else rate,
        expert_slots=slots,
        max_context_tokens=context,
    )
    plan = needs.plan()
    parts = needs.parts()
    names = ["dense weights", "workspace", "KV blocks", "expert slots"]
    assert [part.name for part in parts if part.name != "--memory"] == names
    assert parts[-4].have_nbytes == max(0, needs.budget_nbytes)
    if plan is not None:
        assert plan == plan_memory(needs.config, needs.spec, needs.needs, needs.free_nbytes - DENSE_NBYTES)
        assert needs.mends() == []
        # A last KV block may be begun that the budget does not quite hold, as the node itself does.
        assert sum(part.short_nbytes for part in parts) <= 32 * 1024
        return
    assert any(part.short_nbytes for part in parts)
    for flag in needs.mends():
        assert mended(needs, flag).plan() is not None, flag


def test_the_part_that_is_short_is_named_with_its_number() -> None:
    needs = device_needs(66 * MIB, cache_rate=1.0)
    left_nbytes = int(16 * MIB * BUDGET_SHARE) - 2 * MIB - 4096 * 1024
    assert {part.name: part.short_nbytes for part in needs.parts()} == {
        "dense weights": 0, "workspace": 0, "KV blocks": 0, "expert slots": 8 * needs.layer_slots_nbytes - left_nbytes,
    }  # fmt: skip
    assert needs.mends() == ["--cache-rate 0.625", "--max-context 384"]
    assert device_needs(40 * MIB).parts()[0].short_nbytes == 10 * MIB
    overdrawn = device_needs(60 * MIB, memory_bytes=90 * MIB).parts()[0]
    assert (overdrawn.name, overdrawn.short_nbytes) == ("--memory", 30 * MIB)


def test_the_largest_that_fits_is_suggested() -> None:
    needs = device_needs(66 * MIB)
    most = needs.most_slots()
    assert most == 5
    fits, does_not = (device_needs(66 * MIB, expert_slots=slots).plan() for slots in (most, most + 1))
    assert fits is not None
    assert does_not is None
    assert device_needs(40 * MIB).most_slots() is None


def test_large_gpus_are_asked_for_in_whole_gibibytes() -> None:
    needs = MemoryNeeds(dense_nbytes=10 << 30, kv_nbytes_per_token=1024, workspace_nbytes=2 * MIB)
    small = replace(device_needs(1 << 30, is_asked_gpu=True), needs=needs)
    assert small.mends() == ["--gpu-memory 11GiB (a larger GPU)"]


@pytest.mark.parametrize(
    ("needs", "flag"),
    [
        (device_needs(58 * MIB, max_context_tokens=4096), r"--max-context \d+"),
        (device_needs(55 * MIB, is_asked_gpu=True, expert_slots=8), r"--gpu-memory \d+MiB"),
        (device_needs(90 * MIB, memory_bytes=56 * MIB, expert_slots=8), r"--memory \d+MiB"),
        (device_needs(90 * MIB, memory_bytes=95 * MIB), r"--memory 90MiB"),
        (device_needs(55 * MIB, Dtype.FLOAT32), r"--dtype bfloat16"),
    ],
)
def test_mends_by_what_was_asked(needs: DeviceNeeds, flag: str) -> None:
    assert any(re.match(flag, mend) for mend in needs.mends()), needs.mends()


def test_wishes_that_make_no_sense_are_the_persons() -> None:
    with pytest.raises(SettingUnfit, match=r"compute.expert_slots is 9"):
        device_needs(90 * MIB, expert_slots=9).parts()
