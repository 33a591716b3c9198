"""What `promoe top` shows at any size: invariants of its lines, and the figures worked out by hand."""

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from promoe.cli.heat_map import LABEL_WIDTH, Drawing
from promoe.cli.node_history import NodeHistory, Window
from promoe.cli.top_figures import COLUMN_WIDTH, FIGURES_WIDTH, NAME_WIDTH, figure_lines, quantile_phrase
from promoe.cli.top_view import TopFrame, TopView, frame_lines
from promoe.node_report import Histogram, PredictorState
from tests.promoe.node_samples import VERSION, cache_stats, node_sample, sized_sample

SIZES = ((80, 24), (120, 50), (300, 80), (60, 20), (30, 8))
MODELS = ((30, 32), (48, 128), (58, 256), (1, 8))


def frame(num_layers: int = 30, num_experts: int = 32) -> TopFrame:
    sample = sized_sample(num_layers, num_experts)
    return TopFrame("127.0.0.1:50051", sample, Window(cache_stats(40, num_layers), sample.stats, 10.0))


def plain(shown: TopFrame, width: int = 80, height: int = 24, is_coloured: bool = False) -> list[str]:
    return [line.plain for line in frame_lines(shown, width, height, is_coloured)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(("num_layers", "num_experts"), MODELS)
@pytest.mark.parametrize("is_coloured", [True, False])
def test_a_frame_fits_its_terminal(
    width: int, height: int, num_layers: int, num_experts: int, is_coloured: bool
) -> None:
    lines = frame_lines(frame(num_layers, num_experts), width, height, is_coloured)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines)
    assert lines[0].plain.startswith("promoe top · 127.0.0.1:50051"[: width - 1])


@given(st.integers(1, 200), st.integers(1, 100), st.booleans())
def test_no_terminal_is_too_small(width: int, height: int, is_coloured: bool) -> None:
    lines = frame_lines(frame(4, 8), width, height, is_coloured)
    assert len(lines) <= height
    assert all(line.cell_len <= width for line in lines)


def test_the_demo_model_fits_a_small_terminal_expert_by_expert() -> None:
    shown = frame()
    blocks = plain(shown, 80, 24, is_coloured=True)
    picture = [line[LABEL_WIDTH : LABEL_WIDTH + 32] for line in blocks if line.startswith("L")]
    assert len(picture) == 15  # two layers a line
    assert set("".join(picture)) <= set(" ▀▄")
    signs = plain(shown, 80, 24, is_coloured=False)
    assert len([line for line in signs if line.startswith("L")]) == 15  # two layers a cell
    assert not set("".join(signs)) & set("▀▄")


def test_a_high_terminal_gives_each_layer_its_line() -> None:
    lines = plain(frame(), 80, 40, is_coloured=True)
    assert [line[:LABEL_WIDTH].strip() for line in lines if line.startswith("L")] == [f"L{n}" for n in range(30)]


def test_one_may_ask_for_the_other_drawing() -> None:
    blocks = plain(replace(frame(), drawing=Drawing.BLOCKS), 80, 60)
    assert len([line for line in blocks if line.startswith("L")]) == 15
    signs = plain(replace(frame(), drawing=Drawing.SIGNS), 80, 24, is_coloured=True)
    assert any("!" in line[LABEL_WIDTH:20] for line in signs)


def test_the_figures_of_the_last_seconds_stand_beside_those_since_the_start() -> None:
    lately, total = Window(cache_stats(40), cache_stats(100), 10.0), Window(None, cache_stats(100), 0.0)
    lines = [line.plain for line in figure_lines(lately, total, VERSION)]
    columns = slice(NAME_WIDTH, NAME_WIDTH + COLUMN_WIDTH), slice(NAME_WIDTH + COLUMN_WIDTH, FIGURES_WIDTH)
    figures = {line[:NAME_WIDTH].strip(): [line[column].strip() for column in columns] for line in lines}
    assert figures[""] == ["last 10.0 s", "since start"]
    assert figures["decode"] == ["6.0 tok/s", "100 tok"]
    assert figures["hit rate"] == ["80.0 %", "80.0 %"]
    # 60 decode steps and 3 prefill steps of 20 ms, 5 of them for late prefetches, in 10 s; 105 since the start
    assert figures["stalled"] == ["12.6 %", "2.10 s"]
    assert figures["nothing came"] == ["9.4 %", "1.58 s"]
    assert figures["came too late"] == ["3.1 %", "525 ms"]
    # 60 steps of 40 experts of 83 kB
    assert figures["link"] == ["19.9 MB/s", "317 MiB"]
    assert figures["on demand"] == ["5.23 MB/s", "83.1 MiB"]
    assert figures["prefetch"] == ["14.7 MB/s", "234 MiB"]
    assert figures["layer streaming"] == ["0.00 B/s", "0 B"]
    assert figures["of what it can"] == ["26.9 %", "74.0 MB/s"]
    assert figures["useful/late/waste"] == ["67/17/17 %", "67/17/17 %"]
    assert figures["GoodPred, ahead 2"] == ["56.2 %", "56.2 %"]
    assert figures["accur. × fetch"] == ["75 × 75 %", "75 × 75 %"]
    assert lines[-2:] == ["hints: taken 3000, late 100", "hint latency: median ≤ 1.0 ms, p99 ≤ 5.0 ms"]
    assert max(map(len, lines)) <= FIGURES_WIDTH + 6


def test_before_the_second_look_there_are_totals_only() -> None:
    history = NodeHistory()
    history.add(node_sample(0.0, 100))
    lines = plain(TopFrame("n", history.last, history.lately()))
    decode = next(line for line in lines if "decode" in line)
    assert decode.split()[-4:] == ["decode", "–", "100", "tok"]


def test_without_prefetches_and_hints_their_lines_are_left_out() -> None:
    stats = cache_stats(10)
    silent = replace(
        stats,
        prefetch=replace(stats.prefetch, useful_bytes=0, late_bytes=0, wasted_bytes=0, link_bytes_per_s=0.0),
        hints=replace(stats.hints, qualities=(), latency=Histogram((), ()), observations_dropped=0),
    )
    text = "\n".join(line.plain for line in figure_lines(None, Window(None, silent, 0.0), None))
    assert not any(word in text for word in ("useful", "GoodPred", "of what it can", "latency"))


def test_dropped_observations_are_told() -> None:
    stats = cache_stats(10)
    dropped = replace(stats, hints=replace(stats.hints, observations_sent=90, observations_dropped=4))
    lines = [line.plain for line in figure_lines(None, Window(None, dropped, 0.0), None)]
    assert "observations: sent 90, dropped 4" in lines


@pytest.mark.parametrize(
    ("state", "phrase"),
    [
        (PredictorState.CONNECTED, "predictor learned@3 connected"),
        (PredictorState.AWAY, "predictor away"),
        (PredictorState.NONE, "no predictor"),
    ],
)
def test_the_predictor_is_named_with_its_state(state: PredictorState, phrase: str) -> None:
    shown = frame()
    assert shown.sample is not None
    link = shown.sample.info.predictor
    active = link.active if state is PredictorState.CONNECTED else None
    info = replace(shown.sample.info, predictor=replace(link, state=state, active=active))
    text = "\n".join(plain(replace(shown, sample=replace(shown.sample, info=info)), 120))
    assert phrase in text
    assert "2 running, 1 queued" in text
    assert ("no prefetch in 1 layers" in text) is (active is not None)


def test_a_node_that_went_away_is_still_shown_with_its_last_figures() -> None:
    lines = plain(replace(frame(), away_s=12.0, trouble="refused"))
    assert "AWAY for 12.0 s" in lines[0]
    assert any("decode" in line for line in lines)
    assert plain(TopFrame("n", trouble="Nobody listens."))[1] == "The node has not answered yet. Nobody listens."


def test_quantiles_are_bounds_of_buckets() -> None:
    histogram = Histogram((0.001, 0.01), (90, 9, 1))
    assert [quantile_phrase(histogram, share) for share in (0.5, 0.9, 0.99, 1.0)] == [
        "≤ 1.0 ms", "≤ 1.0 ms", "≤ 10 ms", "> 10 ms",
    ]  # fmt: skip


@pytest.mark.parametrize(("is_mono", "marks"), [(False, "▀"), (True, "!")])
def test_a_terminal_without_colours_gets_signs(is_mono: bool, marks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1" if is_mono else "")
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, color_system="truecolor", width=80, height=24)
    console.print(TopView(frame()))
    assert marks in written.getvalue()
    assert ("▀" in written.getvalue()) is not is_mono
