"""`python -m compute_node.replay`: what is asked, what is printed, and how it ends."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from compute_node.replay.__main__ import main
from compute_node.replay.hint_plan import HintSettings, HintSource
from compute_node.replay.options import parse_options
from compute_node.schedule import HintUse, SlotSplit
from promoe.trace_file import TraceWriter
from tests.compute_node.replay.virtual_runs import TracedSimulation, made_up, what_if
from tests.promoe.traces import MadeUpRun


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = made_up(MadeUpRun(num_layers=4, decode_steps=12))
    return TracedSimulation(run, what_if("proactive", 3)).write(tmp_path_factory.mktemp("traces") / "run.trace")


def document_of(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def replays_of(document: dict[str, object]) -> list[dict[str, object]]:
    replays = document["replays"]
    assert isinstance(replays, list)
    return replays


def test_without_settings_the_run_is_repeated_and_simulated(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = document_of([str(trace)], capsys)
    assert document["verified"] == {"num_layers": 4 * 26, "num_accesses": document["accesses"], "parted": None}
    (row,) = replays_of(document)
    decode, recorded = row["decode"], document["recorded"]
    assert isinstance(decode, dict)
    assert isinstance(recorded, dict)
    assert decode["time_s"] == pytest.approx(recorded["decode"]["time_s"], rel=0.02)
    assert decode["hits"] + decode["misses"] == recorded["decode"]["hits"] + recorded["decode"]["misses"]
    assert decode["limits"]["time_per_floor"] >= 1
    assert decode["bytes"] == sum(decode["bytes_by_reason"].values())


def test_every_combination_is_a_row(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--policy", "lru", "--policy", "promoe", "--cache-rate", "0.25", "--cache-rate", "1"]
    document = document_of([str(trace), *arguments], capsys)
    assert document["verified"] is None
    rows = replays_of(document)
    assert [row["name"] for row in rows] == ["lru @ 0.25", "lru @ 1", "promoe @ 0.25", "promoe @ 1"]
    assert [row["slots_per_layer"] for row in rows] == [2, 8, 2, 8]
    for row in rows:
        if row["cache_rate"] == 1:
            decode = row["decode"]
            assert isinstance(decode, dict)
            assert decode["misses"] == 0
            assert decode["limits"]["time_per_floor"] == pytest.approx(1)


def test_settings_reach_the_simulation(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *("--eviction", "lfu", "--slot-split", "layer", "--hints", "top", "--no-reorder", "--chunk", "1e3"),
        *("--in-flight", "4", "--link", "1e9", "--chunk-us", "5", "--predictor", "oracle", "--lookahead", "3"),
        *("--hint-latency-ms", "0.5"),
    ]
    (row,) = replays_of(document_of([str(trace), *arguments], capsys))
    policy = row["policy"]
    assert isinstance(policy, dict)
    expected = {"eviction": "lfu", "slot_split": "layer", "hints": "top", "reorder": False, "early_preemption": True}
    assert {name: policy[name] for name in expected} == expected
    assert (policy["chunk_nbytes"], policy["max_chunks_in_flight"]) == (1000, 4)
    assert (row["link_bytes_per_s"], row["chunk_s"]) == (1e9, 5e-6)
    assert row["predictor"] == {"source": "oracle", "lookahead": 3, "latency_s": 0.0005}
    assert row["name"] == "proactive/lfu @ 0.375"


def test_people_get_a_table_of_each_phase(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trace)]) == 0
    text = capsys.readouterr().out
    assert "Repeated exactly: hits and misses of all 104 layers" in text
    assert "Simulated in " in text
    assert "prefill: 2 steps, 10 tokens" in text
    assert "decode: 24 steps, 24 tokens" in text
    assert text.count("as recorded") == text.count("proactive @ 0.375 ") == 2
    assert "useful" in text


def test_a_run_that_is_not_its_own_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The made-up run says that it is an LRU run of the node; its prefills are not."""
    shape = MadeUpRun()
    with TraceWriter(tmp_path / "made-up", shape.header()) as writer:
        for event in shape.events():
            writer.append(event)
    assert main([str(tmp_path / "made-up")]) == 1
    assert "replay and run part at step " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--eviction", "best"], "'best'; allowed: "),
        (["--cache-rate", "0.01"], "--cache-rate is 0.01; allowed: from 0.125"),
        (["--cache-rate", "1.2"], "--cache-rate is 1.2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    trace: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trace), *arguments]) == 1
    assert sentence in capsys.readouterr().err


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "There is no trace at" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--link", "0"], ["--chunk", "0"], ["--hints", "some"], ["--policy", "best"], []])
def test_a_wrong_command_line_ends_with_2(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(flag if not flag else ["trace", *flag])
    assert ended.value.code == 2
    assert "usage: promoe trace replay" in capsys.readouterr().err


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--policy",
        "--slot-split",
        "--no-early-preemption",
        "--cache-rate",
        "--link",
        "--lookahead",
        "--json",
    ):
        assert flag in text


def test_nothing_asked_for_is_no_what_if() -> None:
    asked = parse_options(["a.trace"])
    assert not asked.is_what_if
    assert asked.hints == HintSettings()
    for flag in (["--no-reorder"], ["--predictor", "none"], ["--link", "1e9"], ["--policy", "lru"]):
        assert parse_options(["a.trace", *flag]).is_what_if
    given = parse_options(["a.trace", "--slot-split", "global", "--hints", "budgeted", "--predictor", "oracle"])
    assert given.settings["slot_split"] is SlotSplit.GLOBAL
    assert given.settings["hints"] is HintUse.BUDGETED
    assert given.hints.source is HintSource.ORACLE
