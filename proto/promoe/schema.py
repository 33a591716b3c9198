"""Which schema this process speaks, and with which others it gets along."""

from typing import Final, NamedTuple


class Schema(NamedTuple):
    """The version of the protos, `major.minor`.

    A minor adds what the other side can do without; a major changes what is there.
    """

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @classmethod
    def parse(cls, text: str) -> "Schema | None":
        """None for a text that is no version."""
        major, _, minor = text.partition(".")
        if not all(part.isascii() and part.isdecimal() and len(part) <= _MOST_DIGITS for part in (major, minor)):
            return None
        return cls(int(major), int(minor))

    def speaks_with(self, other: "Schema") -> bool:
        """Both ways: the newer end leaves out what the older one does not know."""
        return self.major == other.major and abs(self.minor - other.minor) <= 1


_MOST_DIGITS: Final = 9

OUR_SCHEMA: Final = Schema(1, 1)
"""1.1 adds to 1.0: packets beside the stream, steps that name their version, `observe_every`, `PredictorAdmin`,
`NodeAdmin`. Its protos are recorded in `proto/released` when it is released (`make release-schema`)."""

NAMED_STEPS: Final = Schema(1, 1)
"""From here on a `StepStart` names the version that its observations are for."""
