"""`POST /v1/chat/completions`: what is answered."""

from collections.abc import Sequence

from compute_node.answer import AnswerEvent, Delta, Finish
from compute_node.chat_template import ToolCall
from compute_node.http.answer_wire import FINISH_REASONS, JsonDocument, TokenTexts
from compute_node.sampling import SampledToken
from compute_node.tool_calls import AnswerPiece, ToolCallScanner


class ChatChoice:
    """One choice as it grows: follows the answer's events, and can be written whole or piece by piece.

    Args:
        index: its place.
        scanner: finds calls; None when nothing may be called.
        texts: for log probabilities.
    """

    def __init__(self, index: int, scanner: ToolCallScanner | None, texts: TokenTexts) -> None:
        self._index = index
        self._scanner = scanner
        self._texts = texts
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._logprobs: list[JsonDocument] = []
        self._finish_reason: str | None = None

    def first_chunks(self) -> Sequence[JsonDocument]:
        """Says who speaks."""
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def take(self, event: AnswerEvent) -> Sequence[JsonDocument]:
        """One more event; what it added, as choices of a stream's chunks."""
        if isinstance(event, Finish):
            return self._finish(event)
        token = self._logprobs_of(event.token)
        if token is not None:
            self._logprobs.append(token)
        return self._chunks(self._pieces_of(event), token)

    def document(self) -> JsonDocument:
        """The whole choice."""
        text = "".join(self._content)
        message: JsonDocument = {"role": "assistant", "content": text or None if self._calls else text, "refusal": None}
        if self._calls:
            message["tool_calls"] = [_call_document(call) for call in self._calls]
        return {
            "index": self._index,
            "message": message,
            "logprobs": {"content": self._logprobs, "refusal": None} if self._logprobs else None,
            "finish_reason": self._finish_reason,
        }

    def _pieces_of(self, delta: Delta) -> Sequence[AnswerPiece]:
        if self._scanner is not None:
            return self._scanner.push(delta.text)
        return [delta.text] if delta.text else []

    def _finish(self, event: Finish) -> Sequence[JsonDocument]:
        chunks = self._chunks(self._scanner.flush() if self._scanner is not None else [], None)
        reason = FINISH_REASONS[event.reason]
        self._finish_reason = "tool_calls" if self._calls and reason == "stop" else reason
        return [*chunks, self._chunk({}, None)]

    def _chunks(self, pieces: Sequence[AnswerPiece], token: JsonDocument | None) -> list[JsonDocument]:
        """The token's log probability goes with the first piece, or alone while its text is held back."""
        logprobs: JsonDocument | None = None if token is None else {"content": [token], "refusal": None}
        deltas: list[JsonDocument] = [self._delta(piece) for piece in pieces]
        if not deltas and logprobs is not None:
            deltas = [{"content": ""}]
        return [self._chunk(delta, logprobs if place == 0 else None) for place, delta in enumerate(deltas)]

    def _delta(self, piece: AnswerPiece) -> JsonDocument:
        if isinstance(piece, str):
            self._content.append(piece)
            return {"content": piece}
        self._calls.append(piece)
        return {"tool_calls": [{"index": len(self._calls) - 1, **_call_document(piece)}]}

    def _logprobs_of(self, token: SampledToken | None) -> JsonDocument | None:
        if token is None or token.logprob is None:
            return None
        document = self._texts.document(token.token_id, token.logprob)
        document["top_logprobs"] = [self._texts.document(other.token_id, other.logprob) for other in token.alternatives]
        return document

    def _chunk(self, delta: JsonDocument, logprobs: JsonDocument | None) -> JsonDocument:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": self._finish_reason}


def _call_document(call: ToolCall) -> JsonDocument:
    return {
        "id": call.call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }
