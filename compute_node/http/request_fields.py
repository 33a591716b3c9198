"""What chat and text completions are asked for alike, as OpenAI's API names it, and as the domain wants it."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compute_node.answer import MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, AnswerOptions
from compute_node.answer_grammar import AnswerGrammar
from compute_node.sampling import MAX_SEED, Sampling, draw_seed

MAX_ANSWERS: Final = 128


class RequestFields(BaseModel):
    """A JSON object of a request: what is unknown is refused, and null is the same as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, fields: object) -> object:
        """Clients send null for what nobody asked for."""
        if isinstance(fields, dict):
            return {name: value for name, value in fields.items() if value is not None}
        return fields


class StreamOptions(RequestFields):
    """How a stream is written."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class AnswerFields(RequestFields):
    """Fields of both kinds of completion.

    `user` says who asks and changes no answer. `top_k`, `repetition_penalty`, `stop_token_ids` and `ignore_eos` are
    this server's own, in the names that other servers of open models have for them.
    """

    model: str
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: list[str] = Field(default_factory=list)
    seed: int | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    user: str | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def list_stop(cls, stop: object) -> object:
        """One string is a list of one."""
        stops = [stop] if isinstance(stop, str) else stop
        _check_length("stop", stops, MAX_STOP_STRINGS)
        return stops

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def bound_stop_tokens(cls, ids: object) -> object:
        """Counted before anything is done for each of them."""
        _check_length("stop_token_ids", ids, MAX_STOP_TOKEN_IDS)
        return ids

    @field_validator("n")
    @classmethod
    def bound_n(cls, n: int) -> int:
        """At least one."""
        if not 1 <= n <= MAX_ANSWERS:
            raise ValueError(f"n is {n}; allowed: 1 to {MAX_ANSWERS}")
        return n

    @field_validator("seed")
    @classmethod
    def bound_seed(cls, seed: int | None) -> int | None:
        """64 bits."""
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed is {seed}; allowed: 0 to {MAX_SEED}")
        return seed

    @field_validator("logit_bias")
    @classmethod
    def check_tokens(cls, bias: dict[str, float]) -> dict[str, float]:
        """JSON's keys are strings; these are token ids."""
        for key in bias:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10):
                raise ValueError(f"logit_bias has the key {key[:20]!r}; allowed: token ids")
        return bias

    @model_validator(mode="after")
    def check_stream_options(self) -> "AnswerFields":
        """They say how to stream."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is set; allowed only with stream true")
        return self

    @property
    def includes_usage(self) -> bool:
        """A stream's last event is to say what it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    def answer_options(
        self,
        max_tokens: int,
        top_logprobs: int | None,
        grammar: AnswerGrammar | None = None,
        further_stops: Sequence[str] = (),
    ) -> list[AnswerOptions]:
        """One for each of the `n` answers, whose seeds count up: the first is as if it was asked for alone.

        Raises:
            ValueError: a value out of range.
        """
        seed = draw_seed() if self.seed is None else self.seed
        bias: Mapping[int, float] = {int(token_id): offset for token_id, offset in self.logit_bias.items()}
        return [
            AnswerOptions(
                sampling=Sampling(
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    seed=(seed + index) % (MAX_SEED + 1),
                    repetition_penalty=self.repetition_penalty,
                    top_logprobs=top_logprobs,
                    presence_penalty=self.presence_penalty,
                    frequency_penalty=self.frequency_penalty,
                    logit_bias=bias,
                ),
                max_tokens=max_tokens,
                stop_strings=(*self.stop, *further_stops),
                stop_token_ids=frozenset(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                grammar=grammar,
            )
            for index in range(self.n)
        ]


def _check_length(name: str, values: object, most: int) -> None:
    if isinstance(values, list) and len(values) > most:
        raise ValueError(f"{name} has {len(values)} entries; allowed: at most {most}")
