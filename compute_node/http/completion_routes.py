"""The endpoints that generate: decode, open the answers, hand them to who writes them."""

from collections.abc import Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response

from compute_node.answer import Answer, AnswerOptions
from compute_node.answer_grammar import AnswerGrammar
from compute_node.http.answer_group import AnswerGroup
from compute_node.http.answer_wire import TokenTexts, UsageCount, new_head
from compute_node.http.api_error import check_model
from compute_node.http.chat_fields import ChatFields
from compute_node.http.chat_wire import ChatChoice
from compute_node.http.completion_fields import CompletionFields
from compute_node.http.completion_reply import CompletionReply
from compute_node.http.completion_wire import TextChoice
from compute_node.http.node_parts import NodeParts
from compute_node.prompt import Prompt, TextPrompt, TokenPrompt
from compute_node.tool_calls import ToolCallFormat, ToolCallScanner, ToolWish, format_of


def completion_router(parts: NodeParts) -> APIRouter:
    """`/v1/chat/completions` and `/v1/completions`."""
    router = APIRouter()
    chat_format = format_of(parts.codec.template.source)
    if chat_format is not None and not parts.codec.is_shown(chat_format.begin + chat_format.end):
        chat_format = None

    @router.post("/v1/chat/completions", response_model=None)
    async def chat(fields: ChatFields, request: Request) -> Response:
        check_model(fields.model, parts.model.name)
        reply = await _open_chat(fields, parts, chat_format)
        if fields.stream:
            return reply.stream("chat.completion.chunk", fields.includes_usage)
        return await reply.whole(request)

    @router.post("/v1/completions", response_model=None)
    async def complete(fields: CompletionFields, request: Request) -> Response:
        check_model(fields.model, parts.model.name)
        reply = await _open_texts(fields, parts)
        if fields.stream:
            return reply.stream("text_completion", fields.includes_usage)
        return await reply.whole(request)

    return router


async def _open_chat(fields: ChatFields, parts: NodeParts, known_format: ToolCallFormat | None) -> CompletionReply:
    wish = fields.tool_wish()
    tool_format = None if wish is None else _checked(known_format)
    # Asked for no limit, an answer may fill the context.
    max_tokens = fields.max_completion_tokens or fields.max_tokens or parts.codec.limits.max_context_tokens
    if 0 in (fields.max_tokens, fields.max_completion_tokens):
        raise ValueError("max_tokens is 0; allowed: 1 or more")
    options = fields.answer_options(
        max_tokens,
        (fields.top_logprobs or 0) if fields.logprobs else None,
        _grammar(fields, wish, tool_format),
        # Ended there, the first call is the only one.
        (tool_format.end,) if wish is not None and tool_format is not None and not wish.is_parallel else (),
    )
    answers = await _open(parts, [(fields.prompt(), options)])
    texts = TokenTexts(parts.codec)
    choices = [ChatChoice(index, _scanner(wish, tool_format), texts) for index in range(len(answers))]
    usage = UsageCount(len(answers[0].request.prompt_ids))
    return CompletionReply(AnswerGroup(answers), choices, new_head("chat.completion", "chatcmpl", parts.model), usage)


async def _open_texts(fields: CompletionFields, parts: NodeParts) -> CompletionReply:
    prompts = fields.prompts()
    assert fields.max_tokens is not None, "it has a default, and null is the same as absent"
    opened = [(prompt, fields.answer_options(fields.max_tokens, fields.logprobs)) for prompt in prompts]
    echoed = [await _echo(prompt, parts) if fields.echo else "" for prompt in prompts]
    answers = await _open(parts, opened)
    texts = TokenTexts(parts.codec)
    has_logprobs = fields.logprobs is not None
    choices = [TextChoice(index, echoed[index // fields.n], has_logprobs, texts) for index in range(len(answers))]
    usage = UsageCount(sum(len(answer.request.prompt_ids) for answer in answers[:: fields.n]))
    return CompletionReply(AnswerGroup(answers), choices, new_head("text_completion", "cmpl", parts.model), usage)


async def _open(parts: NodeParts, asked: Sequence[tuple[Prompt, Sequence[AnswerOptions]]]) -> list[Answer]:
    """All answers, or none.

    Raises:
        ValueError: more answers than this node can have at once, whenever it is asked.
    """
    limits = parts.admission.limits
    num_answers, num_places = sum(len(options) for _, options in asked), _num_places(parts)
    if num_answers > num_places:
        raise ValueError(
            f"n asks for {num_answers} answers at once; allowed: up to {num_places} "
            f"({limits.max_concurrent_requests} run and {limits.max_queued_requests} wait)"
        )
    answers: list[Answer] = []
    try:
        for prompt, options in asked:
            answers += await parts.answerer.open_all(prompt, options)
    except BaseException:
        for answer in answers:
            answer.cancel()
        raise
    return answers


def _num_places(parts: NodeParts) -> int:
    limits = parts.admission.limits
    return limits.max_concurrent_requests + limits.max_queued_requests


def _checked(known_format: ToolCallFormat | None) -> ToolCallFormat:
    if known_format is None:
        raise ValueError(
            "tools is set, but this model's chat template has no place for tools, or a format of calls that is not "
            'supported; allowed: tool_choice "none"'
        )
    return known_format


def _grammar(fields: ChatFields, wish: ToolWish | None, tool_format: ToolCallFormat | None) -> AnswerGrammar | None:
    grammar = fields.grammar()
    if wish is None or tool_format is None:
        return grammar
    if grammar is not None:
        raise ValueError('response_format is set together with tools; allowed: tool_choice "none"')
    return tool_format.grammar(wish)


def _scanner(wish: ToolWish | None, tool_format: ToolCallFormat | None) -> ToolCallScanner | None:
    return None if wish is None or tool_format is None else ToolCallScanner(tool_format, wish.tools)


async def _echo(prompt: Prompt, parts: NodeParts) -> str:
    if isinstance(prompt, TextPrompt):
        return prompt.text
    assert isinstance(prompt, TokenPrompt), "a completion's prompt is no chat"
    return await parts.codec.detokenize(prompt.token_ids)
