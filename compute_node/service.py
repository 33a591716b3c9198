"""The Inference service: wire messages in and out, nothing else."""

from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, TypeAlias

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from compute_node.admission import Admission
from compute_node.answer import (
    DEFAULT_MAX_TOKENS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    Answerer,
    AnswerOptions,
    Delta,
    Finish,
    FinishReason,
    Usage,
)
from compute_node.chat_template import ChatTurn
from compute_node.engine import EngineKind
from compute_node.logit_offsets import MAX_BIASED_TOKENS
from compute_node.node_report import CacheReporter, NodeIdentity
from compute_node.prompt import MAX_CHAT_MESSAGES, ChatPrompt, Prompt, PromptCodec, TextPrompt, TokenPrompt
from compute_node.sampling import MAX_TOP_LOGPROBS, SampledToken, Sampling, draw_seed
from compute_node.step_ledger import ExpertUse
from compute_node.trace_recorder import TraceBeginning, TraceRecorder, TraceWish
from promoe import node_report
from promoe.trace_wire import encode_batch
from promoe.typed_message import encode_message
from promoe.v1 import inference_pb2, inference_pb2_grpc, model_pb2
from promoe.wire import SCHEMA_VERSION, encode_spec

if TYPE_CHECKING:
    import grpc.aio

    # gRPC's classes are generic for the type checker only.
    _Context: TypeAlias = grpc.aio.ServicerContext[Message, Message]

SERVICE_NAME: Final = "promoe.v1.Inference"

_ENGINE_TO_WIRE: Final = {
    EngineKind.CONTINUOUS: inference_pb2.ENGINE_KIND_CONTINUOUS,
    EngineKind.INTERLEAVED: inference_pb2.ENGINE_KIND_INTERLEAVED,
}

_REASON_TO_WIRE: Final = {
    FinishReason.END_OF_SEQUENCE: inference_pb2.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_STRING: inference_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: inference_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.MAX_TOKENS: inference_pb2.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_FULL: inference_pb2.FINISH_REASON_CONTEXT_FULL,
}


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Serves one model.

    Args:
        answerer: opens answers.
        codec: between text and tokens.
        admission: asked for its limits and load.
        identity: what does not change while the process lives.
        reporter: asked about the expert cache and the store.
        traces: records what the expert cache is told.
    """

    def __init__(
        self,
        answerer: Answerer,
        codec: PromptCodec,
        admission: Admission,
        identity: NodeIdentity,
        reporter: CacheReporter,
        traces: TraceRecorder,
    ) -> None:
        self._answerer = answerer
        self._codec = codec
        self._admission = admission
        self._identity = identity
        self._reporter = reporter
        self._traces = traces

    def register(self, server: "grpc.aio.Server") -> None:
        """Makes the server answer for this service."""
        inference_pb2_grpc.add_InferenceServicer_to_server(self, server)

    async def GetInfo(
        self, request: inference_pb2.InferenceGetInfoRequest, context: "_Context"
    ) -> inference_pb2.InferenceGetInfoResponse:
        """See inference.proto."""
        identity = self._identity
        return inference_pb2.InferenceGetInfoResponse(
            service=model_pb2.ServiceInfo(
                version=version("promoe"), schema_version=SCHEMA_VERSION, instance_id=identity.instance_id
            ),
            model=encode_spec(identity.model),
            engine=_ENGINE_TO_WIRE[identity.engine],
            engine_reason=identity.engine_reason,
            device=encode_message(identity.device, inference_pb2.DeviceInfo),
            limits=self._limits(),
            expert_cache=encode_message(self._reporter.cache_shape(), inference_pb2.CacheShape),
            store=encode_message(self._reporter.store_link(), inference_pb2.StoreLink),
            predictor=encode_message(self._reporter.predictor_link(), inference_pb2.PredictorLink),
        )

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: "_Context"
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """See inference.proto."""
        prompt, options = _decode_generate(request, self._codec.limits.max_context_tokens)
        answer = await self._answerer.open(prompt, options)
        # Called as soon as the client is gone, even while this generator waits to be asked for its next message.
        # (Its stub declares the callback's type as a class.)
        context.add_done_callback(lambda _: answer.cancel())  # type: ignore[arg-type]
        yield inference_pb2.GenerateResponse(
            accepted=inference_pb2.Accepted(
                request_id=answer.request.request_id,
                prompt_tokens=len(answer.request.prompt_ids),
                seed=answer.request.sampling.seed,
            )
        )
        async for event in answer.events():
            if isinstance(event, Delta):
                yield inference_pb2.GenerateResponse(delta=self._encode_delta(event))
            else:
                yield inference_pb2.GenerateResponse(finish=_encode_finish(event))

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: "_Context"
    ) -> inference_pb2.TokenizeResponse:
        """See inference.proto."""
        _refuse_unknown_fields(request, "request")
        if request.WhichOneof("input") == "chat":
            token_ids = await self._codec.tokenize(_decode_chat(request.chat))
        elif request.WhichOneof("input") == "text":
            token_ids = await self._codec.tokenize(TextPrompt(request.text))
        else:
            raise ValueError("input is not set; allowed: text, chat")
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: "_Context"
    ) -> inference_pb2.DetokenizeResponse:
        """See inference.proto."""
        return inference_pb2.DetokenizeResponse(text=await self._codec.detokenize(request.token_ids))

    async def CacheStats(
        self, request: inference_pb2.CacheStatsRequest, context: "_Context"
    ) -> inference_pb2.CacheStatsResponse:
        """See inference.proto."""
        return encode_message(self._cache_stats(), inference_pb2.CacheStatsResponse)

    async def CacheMap(
        self, request: inference_pb2.CacheMapRequest, context: "_Context"
    ) -> inference_pb2.CacheMapResponse:
        """See inference.proto."""
        return encode_message(self._reporter.cache_map(), inference_pb2.CacheMapResponse)

    async def Trace(
        self, request: inference_pb2.TraceRequest, context: "_Context"
    ) -> AsyncIterator[inference_pb2.TraceResponse]:
        """See inference.proto."""
        _refuse_unknown_fields(request, "request")
        recording = self._traces.open(TraceWish(request.max_rows, request.layer_input, request.router_input))
        context.add_done_callback(lambda _: self._traces.close(recording))  # type: ignore[arg-type]  # as in Generate
        yield inference_pb2.TraceResponse()
        beginning = await recording.beginning()
        info = await self.GetInfo(inference_pb2.InferenceGetInfoRequest(), context)
        yield inference_pb2.TraceResponse(header=_encode_beginning(beginning, info, self._cache_stats()))
        async for response in recording.batches(lambda batch: encode_batch(batch, beginning.began_s)):
            yield response

    def _cache_stats(self) -> node_report.CacheStats:
        return self._reporter.cache_stats(self._admission.num_running, self._admission.num_queued)

    def _limits(self) -> inference_pb2.Limits:
        limits = self._codec.limits
        return inference_pb2.Limits(
            max_context_tokens=limits.max_context_tokens,
            max_new_tokens=limits.max_context_tokens - 1,
            max_concurrent_requests=self._admission.limits.max_concurrent_requests,
            max_queued_requests=self._admission.limits.max_queued_requests,
            max_prompt_bytes=limits.max_prompt_bytes,
            max_top_logprobs=MAX_TOP_LOGPROBS,
            max_stop_strings=MAX_STOP_STRINGS,
        )

    def _encode_delta(self, delta: Delta) -> inference_pb2.TextDelta:
        token = delta.token
        if token is None:
            return inference_pb2.TextDelta(text=delta.text)
        message = inference_pb2.TextDelta(text=delta.text, token_ids=[token.token_id])
        if token.logprob is not None:
            message.logprobs.append(self._encode_logprobs(token, token.logprob))
        return message

    def _encode_logprobs(self, token: SampledToken, logprob: float) -> inference_pb2.GeneratedToken:
        def encode(token_id: int, logprob: float) -> inference_pb2.TokenLogprob:
            return inference_pb2.TokenLogprob(token_id=token_id, text=self._codec.token_text(token_id), logprob=logprob)

        return inference_pb2.GeneratedToken(
            token=encode(token.token_id, logprob),
            alternatives=[encode(other.token_id, other.logprob) for other in token.alternatives],
        )


def _decode_generate(request: inference_pb2.GenerateRequest, max_context_tokens: int) -> tuple[Prompt, AnswerOptions]:
    _refuse_more_than(max_context_tokens, len(request.token_ids.ids), "prompt.token_ids")
    _refuse_unknown_fields(request, "request")
    _refuse_unknown_fields(request.sampling, "sampling")
    return _decode_prompt(request), _decode_options(request.sampling)


def _decode_prompt(request: inference_pb2.GenerateRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return TextPrompt(request.text)
    if kind == "chat":
        return _decode_chat(request.chat)
    if kind == "token_ids":
        return TokenPrompt(tuple(request.token_ids.ids))
    raise ValueError("prompt is not set; allowed: text, chat, token_ids")


def _decode_chat(chat: inference_pb2.Chat) -> ChatPrompt:
    _refuse_more_than(MAX_CHAT_MESSAGES, len(chat.messages), "prompt.chat.messages")
    for message in (chat, *chat.messages):
        _refuse_unknown_fields(message, "prompt.chat")
    return ChatPrompt(tuple(ChatTurn(message.role, message.content) for message in chat.messages))


def _decode_options(params: inference_pb2.SamplingParams) -> AnswerOptions:
    _refuse_more_than(MAX_STOP_STRINGS, len(params.stop_strings), "stop_strings")
    _refuse_more_than(MAX_STOP_TOKEN_IDS, len(params.stop_token_ids), "stop_token_ids")
    _refuse_more_than(MAX_BIASED_TOKENS, len(params.logit_bias), "logit_bias")
    sampling = Sampling(
        temperature=params.temperature,
        top_k=params.top_k if params.HasField("top_k") else None,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        seed=params.seed if params.HasField("seed") else draw_seed(),
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        top_logprobs=params.top_logprobs if params.HasField("top_logprobs") else None,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
    )
    return AnswerOptions(
        sampling=sampling,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else DEFAULT_MAX_TOKENS,
        stop_strings=tuple(params.stop_strings),
        stop_token_ids=frozenset(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
    )


def _refuse_more_than(most: int, num_given: int, name: str) -> None:
    """Counted before anything is done for each of them: a message has room for millions."""
    if num_given > most:
        raise ValueError(f"{name} has {num_given} entries; allowed: at most {most}")


def _refuse_unknown_fields(message: Message, name: str) -> None:
    """A parameter that this version does not know must not be dropped silently: the answer would not be as asked."""
    fields = UnknownFieldSet(message)
    unknown = [fields[index].field_number for index in range(len(fields))]
    if unknown:
        known = ", ".join(f"{field.name} = {field.number}" for field in message.DESCRIPTOR.fields)
        raise ValueError(f"{name} has unknown field numbers {unknown}; allowed: {known}")


def _encode_finish(finish: Finish) -> inference_pb2.Finish:
    return inference_pb2.Finish(
        reason=_REASON_TO_WIRE[finish.reason],
        stop_string=finish.stop_string,
        stop_token_id=finish.stop_token_id,
        usage=_encode_usage(finish.usage),
    )


def _encode_usage(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(
        prompt_tokens=usage.num_prompt_tokens,
        output_tokens=usage.num_output_tokens,
        ttft_s=usage.ttft_s,
        tpot_s=usage.tpot_s,
        queue_s=usage.queue_s,
        prefill=_encode_use(usage.experts.prefill),
        decode=_encode_use(usage.experts.decode),
    )


def _encode_use(use: ExpertUse) -> inference_pb2.ExpertUse:
    return inference_pb2.ExpertUse(
        hits=use.hits, misses=use.misses, loaded_bytes=use.loaded_nbytes, stall_s=use.stall_s
    )


def _encode_beginning(
    beginning: TraceBeginning, info: inference_pb2.InferenceGetInfoResponse, stats: node_report.CacheStats
) -> inference_pb2.TraceHeader:
    return inference_pb2.TraceHeader(
        service=info.service,
        model=info.model,
        shape=info.expert_cache,
        device=info.device,
        link_bytes_per_s=stats.uploaded_bytes / stats.link_busy_s if stats.link_busy_s else 0.0,
        began_unix_s=beginning.began_unix_s,
        resident=beginning.snapshot.resident,
        history_json=beginning.snapshot.history_json,
    )
