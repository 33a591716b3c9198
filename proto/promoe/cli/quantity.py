"""Sizes, rates and times as people write and read them."""

import math
import re
from typing import Final

_UNITS: Final = {
    "": 1,
    "B": 1,
    "K": 1 << 10,
    "KB": 10**3,
    "KiB": 1 << 10,
    "M": 1 << 20,
    "MB": 10**6,
    "MiB": 1 << 20,
    "G": 1 << 30,
    "GB": 10**9,
    "GiB": 1 << 30,
    "T": 1 << 40,
    "TB": 10**12,
    "TiB": 1 << 40,
}
_UNITS_BY_LOWER: Final = {unit.lower(): factor for unit, factor in _UNITS.items()}
_QUANTITY: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(e[0-9]+)?\s*([a-z]*)\s*", re.IGNORECASE)


def parse_nbytes(text: str) -> int:
    """Bytes of `24GiB` (binary), `8GB` (decimal), `512M` (binary) or a plain number.

    Raises:
        ValueError: the text is not a size above zero.
    """
    match = _QUANTITY.fullmatch(text)
    factor = _UNITS_BY_LOWER.get(match[3].lower()) if match else None
    nbytes = float(match[1] + (match[2] or "")) * factor if match and factor else 0.0
    if not 1 <= nbytes < math.inf:
        raise ValueError(f"{text!r} is not a size; write a number above 0 with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return round(nbytes)


def parse_bytes_per_s(text: str) -> int:
    """Bytes per second of `25GB/s`, `25GB` or a plain number.

    Raises:
        ValueError: the text is not a rate above zero.
    """
    try:
        return parse_nbytes(re.sub(r"\s*/\s*s\s*$", "", text))
    except ValueError:
        raise ValueError(f"{text!r} is not a rate; write for example 25GB/s") from None


def parse_share(text: str) -> float:
    """A part of a whole: `10%` or `0.1`.

    Raises:
        ValueError: it is none, or not more than nothing and less than all.
    """
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0.0 < share < 1.0:
        raise ValueError(f"{text!r} is not a share; write for example 10% or 0.1")
    return share


def format_nbytes(nbytes: float) -> str:
    """`0 B`, `83.0 KiB`, `6.70 GiB`: three figures, binary units."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{_three_figures(size)} {unit}"
        size /= 1024
    return f"{_three_figures(size)} TiB"


def format_bytes_per_s(rate: float) -> str:
    """`950 MB/s`, `2.00 GB/s`: three figures, decimal units, as links and disks are sold."""
    size = float(rate)
    for unit in ("B/s", "kB/s", "MB/s"):
        if size < 999.5:
            return f"{_three_figures(size)} {unit}"
        size /= 1000
    return f"{_three_figures(size)} GB/s"


def format_s(seconds: float) -> str:
    """`43 ms`, `1.25 s`, `2 min 5 s`."""
    if seconds < 0.9995:
        ms = seconds * 1000
        return f"{ms:.0f} ms" if ms >= 9.95 else f"{ms:.1f} ms"
    if seconds < 99.95:
        return f"{_three_figures(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def format_rate(rate: float | None) -> str:
    """A share as per cent, or a dash where there is none."""
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _three_figures(number: float) -> str:
    return f"{number:.0f}" if number >= 99.95 else f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"
