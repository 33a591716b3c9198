"""Sizes and rates: what is written is read back, and nonsense is told apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promoe.cli.quantity import (
    format_bytes_per_s,
    format_nbytes,
    format_rate,
    format_s,
    parse_bytes_per_s,
    parse_nbytes,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 << 30),
        ("8GB", 8 * 10**9),
        ("512M", 512 << 20),
        ("1.5 GiB", 3 << 29),
        ("1e9", 10**9),
        ("17", 17),
        (" 2tib ", 2 << 40),
        ("3k", 3 << 10),
        (".5KiB", 512),
    ],
)
def test_sizes_people_write(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "8Gx", "-3GB", "0", "0.1", "nan", "inf", "1e999", "8 G B", "0x10", "1,5GB"]
)
def test_what_is_no_size_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write a number above 0 with B, KB"):
        parse_nbytes(text)


def test_rates() -> None:
    assert parse_bytes_per_s("25GB/s") == parse_bytes_per_s("25GB") == parse_bytes_per_s("25e9") == 25 * 10**9
    assert parse_bytes_per_s("64 GiB / s") == 64 << 30
    with pytest.raises(ValueError, match="'fast' is not a rate; write for example 25GB/s"):
        parse_bytes_per_s("fast")


@given(st.integers(0, 1 << 60))
def test_a_formatted_size_is_short_and_close_to_the_size(nbytes: int) -> None:
    text = format_nbytes(nbytes)
    number = text.split()[0]
    assert len(number.replace(".", "")) <= 3 or text.endswith("TiB")
    if nbytes:
        assert abs(parse_nbytes(text) - nbytes) <= max(1, 0.006 * nbytes)


def test_formats_for_people() -> None:
    assert [format_nbytes(n) for n in (0, 999, 85000, 7 << 30, 1 << 40)] == [
        "0 B", "999 B", "83.0 KiB", "7.00 GiB", "1.00 TiB",
    ]  # fmt: skip
    assert [format_s(s) for s in (0.00123, 0.0431, 1.254, 42.0, 125.4)] == [
        "1.2 ms", "43 ms", "1.25 s", "42.0 s", "2 min 5 s",
    ]  # fmt: skip
    assert [format_bytes_per_s(r) for r in (12, 950e6, 2e9, 64e9)] == ["12.0 B/s", "950 MB/s", "2.00 GB/s", "64.0 GB/s"]
    assert (format_rate(None), format_rate(0.6824)) == ("–", "68.2 %")


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), ("0.25", 0.25), (" 12.5 %", 0.125), (".5", 0.5)])
def test_a_share_is_written_either_way(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "0", "1", "100%", "-5%", "nan", "150%", "ten"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        parse_share(text)
