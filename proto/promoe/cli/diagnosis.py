"""What a check of the host found."""

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """`warn`: works, but slower or less than it could. `fail`: does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        name: what was looked at.
        verdict: how it is.
        found: what is there.
        mend: what to do about it; empty when nothing needs doing.
    """

    name: str
    verdict: Verdict
    found: str
    mend: str = ""


def ok(name: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(name, Verdict.OK, found)


def warn(name: str, found: str, mend: str) -> Finding:
    """Works, but."""
    return Finding(name, Verdict.WARN, found, mend)


def fail(name: str, found: str, mend: str) -> Finding:
    """Does not work."""
    return Finding(name, Verdict.FAIL, found, mend)
