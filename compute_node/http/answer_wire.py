"""What the answers of chat and text completions have alike on the wire."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from compute_node.answer import Finish, FinishReason
from compute_node.prompt import PromptCodec
from promoe.model_spec import ModelSpec

JsonDocument = dict[str, object]

_LEAST_LOGPROB: Final = -9999.0

FINISH_REASONS: Final[Mapping[FinishReason, str]] = {
    FinishReason.END_OF_SEQUENCE: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.STOP_TOKEN: "stop",
    FinishReason.MAX_TOKENS: "length",
    FinishReason.CONTEXT_FULL: "length",
}


@dataclass(frozen=True)
class ServedModel:
    """What every answer says about who made it.

    Attributes:
        name: what clients ask for.
        fingerprint: changes whenever the same seed might give another answer.
        max_context_tokens: prompt plus answer.
        loaded_unix_s: wall-clock time of the start.
    """

    name: str
    fingerprint: str
    max_context_tokens: int
    loaded_unix_s: int

    @classmethod
    def of(cls, spec: ModelSpec, max_context_tokens: int) -> "ServedModel":
        """The model of a pack, loaded now."""
        fingerprint = f"fp_{spec.fingerprint}"
        return cls(spec.name, fingerprint, max_context_tokens, loaded_unix_s=int(time.time()))


def new_head(kind: str, prefix: str, model: ServedModel) -> JsonDocument:
    """The fields that all pieces of an answer share."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),  # created_unix_s
        "model": model.name,
        "system_fingerprint": model.fingerprint,
    }


@dataclass
class UsageCount:
    """Adds up what the answers to one request took; a prompt counts once, however many answers it got."""

    prompt_tokens: int
    output_tokens: int = field(default=0, init=False)

    def add(self, finish: Finish) -> None:
        """One more answer."""
        self.output_tokens += finish.usage.num_output_tokens

    def document(self) -> JsonDocument:
        """For the wire."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.prompt_tokens + self.output_tokens,
        }


def json_logprob(logprob: float) -> float:
    """JSON has no infinity: what OpenAI's API has in its place."""
    return max(logprob, _LEAST_LOGPROB)


class TokenTexts:
    """Tokens for people to look at."""

    def __init__(self, codec: PromptCodec) -> None:
        self._codec = codec

    def text(self, token_id: int) -> str:
        """A token alone; a replacement character where it is a part of one."""
        return self._codec.token_text(token_id)

    def document(self, token_id: int, logprob: float) -> JsonDocument:
        """A token with its log probability; its bytes are null where they are not those of the text."""
        text = self.text(token_id)
        is_whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {
            "token": text,
            "bytes": list(text.encode()) if is_whole else None,
            "logprob": json_logprob(logprob),
        }
