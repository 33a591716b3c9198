"""From tokens to text that is certain: whole characters only, nothing retracted, ended before a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"
"""What decoders show for the bytes of an unfinished character."""


class TokenDecoder(Protocol):
    """Decodes tokens as one text: `PromptCodec`, or a table in tests."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text; special tokens are left out."""


class Detokenizer:
    """Decodes an answer piece by piece.

    A token's text depends on the tokens before it (leading spaces, characters of several tokens), so each step decodes
    a short window twice, with and without the new tokens, and what is longer is new. The window starts where the
    previous piece started:
    ```
    ids:  ..........|  previous piece  |  not yet certain  |
                 _window            _certain            len(ids)
    ```
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._window = 0
        self._certain = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that became certain, empty while a character is incomplete."""
        self._ids.append(token_id)
        text = self._pending_text()
        if text.endswith(_INCOMPLETE):
            return ""
        self._window = self._certain
        self._certain = len(self._ids)
        return text

    def flush(self) -> str:
        """The rest, with replacement characters where the answer ended inside a character."""
        text = self._pending_text()
        self._window = self._certain = len(self._ids)
        return text

    def _pending_text(self) -> str:
        known = self._decoder.decode(self._ids[self._window : self._certain])
        return self._decoder.decode(self._ids[self._window :])[len(known) :]


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces.

    First is the one that is complete first, and of those that end together the longest: that does not depend on how the
    text was cut into pieces. Text that might be the beginning of a stop string is held back.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        assert all(stop_strings), "an empty stop string was not refused"
        self._stop_strings = tuple(sorted(set(stop_strings), key=len, reverse=True))
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Adds text; returns what can be shown, and the stop string that was found (nothing may follow then)."""
        num_old = len(self._held)
        self._held += text
        found = self._find(num_old)
        if found is not None:
            start, stop_string = found
            shown, self._held = self._held[:start], ""
            return shown, stop_string
        num_shown = len(self._held) - self._num_possible()
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown, None

    def flush(self) -> str:
        """The text that was held back: no stop string comes any more."""
        shown, self._held = self._held, ""
        return shown

    def _find(self, num_old: int) -> tuple[int, str] | None:
        """The match that ends first; all end in the new text, for the old was searched before."""
        best: tuple[int, int, str] | None = None
        for stop_string in self._stop_strings:
            start = self._held.find(stop_string, max(0, num_old - len(stop_string) + 1))
            if start >= 0:
                candidate = (start + len(stop_string), start, stop_string)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[1:]

    def _num_possible(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max((overlap(self._held, stop_string) for stop_string in self._stop_strings), default=0)


def overlap(text: str, stop_string: str) -> int:
    """Length of the longest end of the text that begins the stop string without being all of it."""
    for length in range(min(len(text), len(stop_string) - 1), 0, -1):
        if text.endswith(stop_string[:length]):
            return length
    return 0


@dataclass(frozen=True)
class TextPiece:
    """What one token added to the answer's text.

    Attributes:
        text: certain text, possibly empty.
        stop_string: the stop string that ended the answer before this token's text ended.
    """

    text: str
    stop_string: str | None = None


class TextStream:
    """One answer's text: detokenised, and ended before the first stop string."""

    def __init__(self, decoder: TokenDecoder, stop_strings: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decoder)
        self._matcher = StopMatcher(stop_strings)

    def push(self, token_id: int) -> TextPiece:
        """Adds a token; after a piece with a stop string no more may come."""
        return TextPiece(*self._matcher.push(self._detokenizer.push(token_id)))

    def flush(self) -> TextPiece:
        """Ends the answer; even its last incomplete character may complete a stop string."""
        shown, stop_string = self._matcher.push(self._detokenizer.flush())
        return TextPiece(shown + self._matcher.flush(), stop_string)
