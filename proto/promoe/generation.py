"""One generation as a client sees it: what is asked for (checked and encoded) and the answer as it grows."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias, TypedDict

from promoe.rpc import MAX_MESSAGE_NBYTES
from promoe.typed_message import decode_message
from promoe.v1 import inference_pb2

Prompt: TypeAlias = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Plain text as it is, chat messages (`{"role": …, "content": …}`) for the model's chat template, or token ids."""


class GenerateOptions(TypedDict, total=False):
    """Sampling parameters; what is left out has the server's default (see SamplingParams in inference.proto)."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    repetition_penalty: float
    stop_strings: Sequence[str]
    stop_token_ids: Sequence[int]
    top_logprobs: int
    ignore_eos: bool
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


class FinishReason(Enum):
    """Why an answer ended; `cancelled` is the client's own."""

    UNSPECIFIED = "unspecified"
    END_OF_SEQUENCE = "end_of_sequence"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of the model's own probability for it."""

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class GeneratedToken:
    """A generated token and the likeliest alternatives at its place."""

    token: TokenLogprob
    alternatives: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Delta:
    """What one message added: text (maybe empty while a character is incomplete), tokens, log probabilities."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[GeneratedToken, ...]


@dataclass(frozen=True)
class ExpertUse:
    """What the request's tokens asked of the expert cache in one phase."""

    hits: int
    misses: int
    loaded_bytes: int
    stall_s: float

    @property
    def hit_rate(self) -> float | None:
        """Hits ÷ (hits + misses); None without an access."""
        accesses = self.hits + self.misses
        return self.hits / accesses if accesses else None


@dataclass(frozen=True)
class Usage:
    """What the answer took; times in seconds, measured by the node."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float | None
    queue_s: float
    prefill: ExpertUse
    decode: ExpertUse


@dataclass(frozen=True)
class _Finish:
    reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage


class Answer:
    """The answer so far: folds the server's messages.

    Attributes:
        request_id: the server's name for the request; empty until it was accepted.
        prompt_tokens: tokens of the prompt.
        seed: makes the same request give the same answer again.
        text: the text so far.
        token_ids: the tokens so far.
        logprobs: one per token, when asked for.
        finish_reason: None while the answer grows.
        stop_string: the stop string that ended it.
        stop_token_id: the stop token that ended it.
        usage: figures, once finished by the server.
    """

    def __init__(self) -> None:
        self.request_id = ""
        self.prompt_tokens = 0
        self.seed: int | None = None
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[GeneratedToken] = []
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.stop_token_id: int | None = None
        self.usage: Usage | None = None

    def fold(self, message: inference_pb2.GenerateResponse) -> Delta | None:
        """Takes in one message of the stream; returns what it added, if it added anything."""
        if message.HasField("delta"):
            delta = decode_message(message.delta, Delta)
            self.text += delta.text
            self.token_ids.extend(delta.token_ids)
            self.logprobs.extend(delta.logprobs)
            return delta
        if message.HasField("accepted"):
            self.request_id = message.accepted.request_id
            self.prompt_tokens = message.accepted.prompt_tokens
            self.seed = message.accepted.seed
        elif message.HasField("finish"):
            finish = decode_message(message.finish, _Finish)
            self.finish_reason = finish.reason
            self.stop_string = finish.stop_string
            self.stop_token_id = finish.stop_token_id
            self.usage = finish.usage
        return None


_KNOWN_OPTIONS: Final = tuple(GenerateOptions.__annotations__)


def encode_generate(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """To the wire.

    Raises:
        ValueError: the prompt is none of the three forms, is empty or too large to send, or an option is unknown
            (the known ones are listed) or not of its type.
    """
    request = inference_pb2.GenerateRequest(sampling=_encode_options(options))
    if isinstance(prompt, str):
        request.text = prompt
    elif is_chat(prompt):
        request.chat.CopyFrom(encode_chat(prompt))
    else:
        request.token_ids.ids.extend(_encode_token_ids("prompt", prompt))
    nbytes = request.ByteSize()
    if nbytes > MAX_MESSAGE_NBYTES:
        raise ValueError(f"The request is {nbytes} bytes; at most {MAX_MESSAGE_NBYTES} can be sent.")
    return request


def is_chat(prompt: Prompt) -> bool:
    """True for chat messages.

    Raises:
        ValueError: a sequence without elements, whose kind nobody can tell.
    """
    if isinstance(prompt, str):
        return False
    if len(prompt) == 0:
        raise ValueError("The prompt is empty.")
    return isinstance(prompt[0], Mapping)


def encode_chat(messages: Prompt) -> inference_pb2.Chat:
    """To the wire.

    Raises:
        ValueError: a message is not a mapping of `role` and `content` to text.
    """
    chat = inference_pb2.Chat()
    for message in messages:
        if (
            not isinstance(message, Mapping)
            or set(message) != {"role", "content"}
            or not all(isinstance(value, str) for value in message.values())
        ):
            raise ValueError(f"A chat message is a mapping of role and content to text, not {message!r}.")
        chat.messages.add(role=message["role"], content=message["content"])
    return chat


def _encode_token_ids(name: str, token_ids: Sequence[object]) -> list[int]:
    """Any integers (numpy's too) that fit an unsigned 32-bit field."""
    ids: list[int] = []
    for value in token_ids:
        try:
            number = operator.index(value)  # type: ignore[arg-type]  # the TypeError is the check
        except TypeError:
            raise ValueError(f"{name} holds {value!r}; token ids are integers") from None
        if not 0 <= number < 1 << 32:
            raise ValueError(f"{name} holds {number}; token ids are from 0 to {(1 << 32) - 1}")
        ids.append(number)
    return ids


def encode_detokenize(token_ids: Sequence[int]) -> inference_pb2.DetokenizeRequest:
    """To the wire; raises ValueError for what is no token id."""
    return inference_pb2.DetokenizeRequest(token_ids=_encode_token_ids("token_ids", token_ids))


def _encode_options(options: GenerateOptions) -> inference_pb2.SamplingParams:
    sampling = inference_pb2.SamplingParams()
    for name, value in options.items():
        if name not in _KNOWN_OPTIONS:
            raise ValueError(f"{name} is not a sampling option; known: {', '.join(_KNOWN_OPTIONS)}")
        if value is None:
            continue
        try:
            if name in ("stop_strings", "stop_token_ids"):
                if isinstance(value, str):
                    raise TypeError("one text is not a list of them")
                getattr(sampling, name).extend(value)
            elif name == "logit_bias":
                sampling.logit_bias.update(options["logit_bias"])
            else:
                setattr(sampling, name, value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is {value!r}, which cannot be sent: {error}") from error
    return sampling
