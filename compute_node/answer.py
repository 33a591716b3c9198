"""One prompt to one answer: encodes, admits, follows the engine's tokens, makes text of them, measures."""

import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from time import perf_counter
from typing import Final, TypeAlias

from compute_node.admission import Admission, AdmittedRequest
from compute_node.answer_grammar import AnswerGrammar, GrammarCompiler
from compute_node.answer_record import AnswerListener, AnswerRecord, AnswerTimes
from compute_node.engine import EndReason, EngineRequest, RequestEnded, RequestStarted, TokenDrawn
from compute_node.prompt import Prompt, PromptCodec
from compute_node.request_metrics import Outcome, RequestMetrics, TokenKind
from compute_node.sampling import SampledToken, Sampling
from compute_node.step_ledger import RequestUse
from compute_node.text_stream import TextPiece, TextStream
from compute_node.token_constraint import TokenConstraint
from promoe.errors import DeadlineExceeded, PromoeError
from promoe.log_format import REQUEST_ID, TRACEPARENT
from promoe.request_id import new_answer_id

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS: Final = 512
MAX_STOP_STRINGS: Final = 16
MAX_STOP_STRING_CHARS: Final = 1024
MAX_STOP_TOKEN_IDS: Final = 1024


@dataclass(frozen=True)
class AnswerOptions:
    """What a caller may ask of an answer besides its prompt.

    Attributes:
        sampling: how tokens are drawn.
        max_tokens: tokens to draw at most, the ending one included.
        stop_strings: the answer ends before the first of these.
        stop_token_ids: the answer ends at these, besides the model's own.
        ignore_eos: go on past the model's own end-of-sequence tokens.
        grammar: what the answer must look like; None: anything.

    Raises:
        ValueError: a value out of range; the text names field, value and range.
    """

    sampling: Sampling
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    grammar: AnswerGrammar | None = None

    def __post_init__(self) -> None:
        if self.grammar is not None and self.ignore_eos:
            raise ValueError(f"ignore_eos is True; allowed with {self.grammar.field}: False")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; allowed: 1 or more")
        for stop_string in self.stop_strings:
            if not 1 <= len(stop_string) <= MAX_STOP_STRING_CHARS:
                raise ValueError(
                    f"stop_strings has a string of {len(stop_string)} characters; allowed: 1 to {MAX_STOP_STRING_CHARS}"
                )


class FinishReason(Enum):
    """Why an answer is complete."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"


@dataclass(frozen=True)
class Delta:
    """Text that became certain, with the token that made it so; the last one may have no token."""

    text: str
    token: SampledToken | None


@dataclass(frozen=True)
class Usage:
    """What an answer took; see `Usage` in inference.proto."""

    num_prompt_tokens: int
    num_output_tokens: int
    ttft_s: float
    tpot_s: float | None
    queue_s: float
    experts: RequestUse


@dataclass(frozen=True)
class Finish:
    """The last event of an answer."""

    reason: FinishReason
    stop_string: str | None
    stop_token_id: int | None
    usage: Usage


AnswerEvent: TypeAlias = Delta | Finish


class Answerer:
    """Opens answers.

    Args:
        admission: the door to the engine.
        codec: between text and tokens.
        eos_token_ids: the model's own end-of-sequence tokens.
        metrics: told tokens, latencies and outcomes.
        grammars: for answers that must look like something.
        listener: told of each answer when it is over.
    """

    def __init__(
        self,
        admission: Admission,
        codec: PromptCodec,
        eos_token_ids: frozenset[int],
        metrics: RequestMetrics,
        grammars: GrammarCompiler,
        listener: AnswerListener | None = None,
    ) -> None:
        self._admission = admission
        self._codec = codec
        self._eos_token_ids = eos_token_ids
        self._metrics = metrics
        self._grammars = grammars
        self._listener = listener

    async def open(self, prompt: Prompt, options: AnswerOptions) -> "Answer":
        """Encodes the prompt and lets it in.

        Raises:
            ValueError: the prompt or a stop token is not allowed.
            Overloaded, Unavailable: see `Admission.admit`.
        """
        return (await self.open_all(prompt, [options]))[0]

    async def open_all(self, prompt: Prompt, options: Sequence[AnswerOptions]) -> list["Answer"]:
        """Several answers to one prompt, which is encoded once; all are let in, or none.

        Args:
            options: one for each answer; their grammar is the first one's.

        Raises:
            ValueError, Overloaded, Unavailable: see `open`.
        """
        arrived_s = perf_counter()
        first = options[0]
        self._codec.check_ids(first.stop_token_ids, "stop_token_ids")
        self._codec.check_ids(first.sampling.logit_bias, "logit_bias")
        self._admission.check_open()
        constraints: Sequence[TokenConstraint | None] = [None] * len(options)
        if first.grammar is not None:
            constraints = await self._grammars.compile(first.grammar, len(options))
        prompt_ids = await self._codec.encode(prompt)
        answers: list[Answer] = []
        try:
            for each, constraint in zip(options, constraints, strict=True):
                answers.append(self._admit(prompt_ids, each, constraint, arrived_s))
        except PromoeError:
            for answer in answers:
                answer.cancel()
            raise
        return answers

    def _admit(
        self, prompt_ids: tuple[int, ...], options: AnswerOptions, constraint: TokenConstraint | None, arrived_s: float
    ) -> "Answer":
        max_tokens = min(options.max_tokens, self._codec.limits.max_context_tokens - len(prompt_ids))
        own_stops = frozenset() if options.ignore_eos else self._eos_token_ids
        request = EngineRequest(
            request_id=new_answer_id(REQUEST_ID.get()),
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            sampling=options.sampling,
            stop_token_ids=own_stops | options.stop_token_ids,
            constraint=constraint,
        )
        admitted = self._admission.admit(request)
        self._metrics.count_tokens(TokenKind.PROMPT, len(prompt_ids))
        text = TextStream(self._codec, options.stop_strings)
        return Answer(admitted, options, text, _AnswerClock(arrived_s, self._metrics), self._metrics, self._listener)


class Answer:
    """An accepted request's answer; iterate over `events` once."""

    def __init__(
        self,
        admitted: AdmittedRequest,
        options: AnswerOptions,
        text: TextStream,
        clock: "_AnswerClock",
        metrics: RequestMetrics,
        listener: AnswerListener | None,
    ) -> None:
        self._admitted = admitted
        self._options = options
        self._text = text
        self._clock = clock
        self._metrics = metrics
        self._listener = listener
        self._traceparent = TRACEPARENT.get()
        self._use: RequestUse | None = None

    @property
    def request(self) -> EngineRequest:
        """What the engine was asked."""
        return self._admitted.request

    def cancel(self) -> None:
        """Ends the request within one step; idempotent."""
        self._admitted.cancel()

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """The answer's text as it becomes certain, then its Finish; no Finish when it was cancelled.

        Raises:
            DeadlineExceeded, PromoeError: see `AdmittedRequest.events`.
        """
        outcome = Outcome.CANCELLED
        try:
            async for event in self._follow():
                if isinstance(event, Finish):
                    outcome = Outcome.FINISHED
                yield event
        except DeadlineExceeded:
            outcome = Outcome.DEADLINE
            raise
        except PromoeError:
            outcome = Outcome.FAILED
            raise
        finally:
            self.cancel()
            self._metrics.count_request(outcome)
            self._tell(outcome)

    async def _follow(self) -> AsyncIterator[AnswerEvent]:
        stop_string: str | None = None
        async for event in self._admitted.events():
            if isinstance(event, RequestStarted):
                self._clock.started(event.at_s)
            elif isinstance(event, TokenDrawn) and stop_string is None:
                self._clock.token(event.at_s)
                piece = self._text.push(event.token.token_id)
                yield Delta(piece.text, event.token)
                if piece.stop_string is not None:
                    # The engine may draw one token more until it hears of this; nobody will see it.
                    stop_string = piece.stop_string
                    self.cancel()
            elif isinstance(event, RequestEnded):
                self._use = event.use
                if event.reason is EndReason.CANCELLED and stop_string is None:
                    return
                if event.reason is EndReason.STOP_TOKEN and stop_string is None:
                    self._clock.token(event.at_s)
                rest = TextPiece("", stop_string) if stop_string is not None else self._text.flush()
                if rest.text:
                    yield Delta(rest.text, None)
                yield self._finish(event, rest.stop_string)

    def _tell(self, outcome: Outcome) -> None:
        """Which tokens they were is nobody's business."""
        fields: dict[str, object] = {
            "answer_id": self.request.request_id,
            "outcome": outcome.value,
            "prompt_tokens": len(self.request.prompt_ids),
            "output_tokens": self._clock.num_tokens,
            "elapsed_s": perf_counter() - self._admitted.arrived_s,
        }
        message = "Answer %s %s: %d prompt tokens, %d output tokens, %.3f s"
        logger.info(message, *fields.values(), extra={"fields": fields})
        if self._listener is not None:
            answer_id, num_prompt_tokens = self.request.request_id, len(self.request.prompt_ids)
            times, num_tokens = self._clock.times(), self._clock.num_tokens
            self._listener(
                AnswerRecord(answer_id, self._traceparent, outcome, num_prompt_tokens, num_tokens, times, self._use)
            )

    def _finish(self, ended: RequestEnded, stop_string: str | None) -> Finish:
        usage = self._clock.usage(len(self.request.prompt_ids), ended.use)
        if stop_string is not None:
            return Finish(FinishReason.STOP_STRING, stop_string, None, usage)
        if ended.reason is EndReason.MAX_TOKENS:
            is_full = self.request.max_tokens < self._options.max_tokens
            return Finish(FinishReason.CONTEXT_FULL if is_full else FinishReason.MAX_TOKENS, None, None, usage)
        asked_for = ended.stop_token_id in self._options.stop_token_ids
        reason = FinishReason.STOP_TOKEN if asked_for else FinishReason.END_OF_SEQUENCE
        return Finish(reason, None, ended.stop_token_id, usage)


class _AnswerClock:
    """When an answer's tokens came; all times are of `time.perf_counter()`."""

    def __init__(self, arrived_s: float, metrics: RequestMetrics) -> None:
        self._arrived_s = arrived_s
        self._started_s = arrived_s
        self._first_s = arrived_s
        self._last_s = arrived_s
        self._has_started = False
        self._num_tokens = 0
        self._metrics = metrics

    def started(self, at_s: float) -> None:
        """The first step."""
        self._has_started = True
        self._started_s = at_s
        self._metrics.observe_queue(at_s - self._arrived_s)

    def token(self, at_s: float) -> None:
        """One more token."""
        if self._num_tokens == 0:
            self._first_s = at_s
            self._metrics.observe_first_token(at_s - self._arrived_s)
        else:
            self._metrics.observe_next_token(at_s - self._last_s)
        self._last_s = at_s
        self._num_tokens += 1
        self._metrics.count_tokens(TokenKind.OUTPUT, 1)

    @property
    def num_tokens(self) -> int:
        """How many there were."""
        return self._num_tokens

    def times(self) -> AnswerTimes:
        """Of an answer that is over now."""
        return AnswerTimes(
            arrived_s=self._arrived_s,
            started_s=self._started_s if self._has_started else None,
            first_s=self._first_s if self._num_tokens else None,
            last_s=self._last_s if self._num_tokens else None,
            ended_s=perf_counter(),
        )

    def usage(self, num_prompt_tokens: int, experts: RequestUse) -> Usage:
        """What it all took."""
        tpot_s = None
        if self._num_tokens > 1:
            tpot_s = (self._last_s - self._first_s) / (self._num_tokens - 1)
            self._metrics.observe_tpot(tpot_s)
        return Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=self._num_tokens,
            ttft_s=self._first_s - self._arrived_s,
            tpot_s=tpot_s,
            queue_s=self._started_s - self._arrived_s,
            experts=experts,
        )
