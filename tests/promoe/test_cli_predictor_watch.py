"""What is watched is shown with its figures, and what cannot be known as not known."""

from rich.console import Console

from promoe.cli.predictor_watch import format_us, quality_view
from promoe.node_report import PrefetchStats
from promoe.predictor_versions import QualityReport, VersionQuality, VersionState

ACTIVE = VersionQuality(
    "learned-demo@2", VersionState.ACTIVE, steps=10, layers=100, hinted=800, correct=600, ready=400, routed=800,
    found=640, observations=100, predict_s=0.01,
)  # fmt: skip
SHADOW = VersionQuality("learned-demo@3", VersionState.SHADOW, 10, 100, 800, 700, 400, 800, 720, 100, 0.2)


def shown(report: QualityReport, prefetched: PrefetchStats | None = None, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(quality_view(report, prefetched))
    return capture.get()


def test_figures_are_ratios_of_the_counts() -> None:
    text = shown(QualityReport(5.0, (ACTIVE, SHADOW), comparisons=10, gain=0.1))
    active, shadow = (line for line in text.splitlines() if line.lstrip().startswith("learned-demo"))
    assert active.split() == ["learned-demo@2", "active", "10", "0.800", "0.750", "0.500", "0.375", "100", "µs"]
    assert shadow.split() == [
        "learned-demo@3", "shadow", "10", "0.900", "0.875", "≥0.500", "≥0.438", "2.0", "ms",
    ]  # fmt: skip
    assert "In 10 steps that both were scored in, the shadow's recall is +0.100." in text
    assert "Nothing was scored yet" not in text


def test_what_is_not_known_is_a_dash_and_a_fault_is_said() -> None:
    broken = VersionQuality("a@1", VersionState.AVAILABLE, fault="its process ended with status -9")
    text = shown(QualityReport(0.0, (broken,)))
    assert "Nothing was scored yet" in text
    assert "a@1: its process ended with status -9" in text
    assert next(line for line in text.splitlines() if line.lstrip().startswith("a@1")).split().count("—") == 5


def test_the_node_s_bytes_are_below_where_it_can_be_asked() -> None:
    text = shown(QualityReport(1.0, (ACTIVE,)), PrefetchStats(2 << 20, 1 << 10, 0, 7, 1.0), width=100)
    assert "2.00 MiB useful, 1.00 KiB late, 0 B wasted." in text


def test_versions_are_whole_in_a_narrow_terminal() -> None:
    assert "learned-demo@2" in shown(QualityReport(1.0, (ACTIVE,)), width=60)


def test_costs_are_written_as_short_as_they_are() -> None:
    assert [format_us(seconds) for seconds in (85e-6, 999e-6, 1.2e-3)] == ["85 µs", "999 µs", "1.2 ms"]
