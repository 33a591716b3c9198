"""The list of versions shows the figures that its headings name."""

from io import StringIO

from rich.console import Console

from promoe.cli.predictor_versions import _versions_table
from promoe.predictor_versions import VersionInfo, VersionMetric, VersionOrigin


def test_recall_at_k_is_not_the_recall_of_longer_lists() -> None:
    metrics = {
        "held_out_loss": 0.2, "recall_at_1.5k_lookahead_1": 0.956, "recall_at_k_lookahead_1": 0.838,
        "recall_at_k_lookahead_2": 0.798,
    }  # fmt: skip
    info = VersionInfo(
        "learned@1",
        "learned",
        VersionOrigin.PACKAGED,
        metrics=tuple(VersionMetric(name, value) for name, value in metrics.items()),
    )
    console = Console(width=100, file=StringIO())
    with console.capture() as told:
        console.print(_versions_table([info, VersionInfo("frequency", "frequency", VersionOrigin.PLUGIN)]))
    assert "0.838" in told.get()
    assert "0.956" not in told.get()
