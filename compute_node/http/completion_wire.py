"""`POST /v1/completions`: what is answered."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from compute_node.answer import AnswerEvent, Delta, Finish
from compute_node.http.answer_wire import FINISH_REASONS, JsonDocument, TokenTexts, json_logprob


@dataclass
class TextLogprobs:
    """Four lists, an entry for each token; `text_offset` counts characters of the choice's text."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[str, float]] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def document(self) -> JsonDocument:
        """For the wire."""
        return dict(vars(self))


class TextChoice:
    """One choice as it grows.

    Args:
        index: its place.
        echoed: the prompt, when the choice is to begin with it.
        has_logprobs: log probabilities were asked for.
        texts: for log probabilities.
    """

    def __init__(self, index: int, echoed: str, has_logprobs: bool, texts: TokenTexts) -> None:
        self._index = index
        self._echoed = echoed
        self._texts = texts
        self._text = echoed
        self._logprobs = TextLogprobs() if has_logprobs else None
        self._finish_reason: str | None = None

    def first_chunks(self) -> Sequence[JsonDocument]:
        """The echoed prompt."""
        return [self._document(self._echoed, None)] if self._echoed else []

    def take(self, event: AnswerEvent) -> Sequence[JsonDocument]:
        """One more event; what it added, as choices of a stream's chunks."""
        if isinstance(event, Finish):
            self._finish_reason = FINISH_REASONS[event.reason]
            return [self._document("", None)]
        added = None if self._logprobs is None else self._added_logprobs(event, self._logprobs)
        self._text += event.text
        return [self._document(event.text, added)] if event.text or added else []

    def document(self) -> JsonDocument:
        """The whole choice."""
        return self._document(self._text, self._logprobs)

    def _added_logprobs(self, delta: Delta, so_far: TextLogprobs) -> TextLogprobs | None:
        token = delta.token
        if token is None or token.logprob is None:
            return None
        added = TextLogprobs(
            [self._texts.text(token.token_id)],
            [json_logprob(token.logprob)],
            [{self._texts.text(other.token_id): json_logprob(other.logprob) for other in token.alternatives}],
            [len(self._text)],
        )
        for name, values in vars(added).items():
            vars(so_far)[name].extend(values)
        return added

    def _document(self, text: str, logprobs: TextLogprobs | None) -> JsonDocument:
        return {
            "index": self._index,
            "text": text,
            "logprobs": None if logprobs is None else logprobs.document(),
            "finish_reason": self._finish_reason,
        }
