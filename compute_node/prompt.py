"""Between text and tokens: prompts, chats and answers, through the model's own tokenizer and chat template.

Encoding or decoding a long text takes seconds: that is done in a worker thread, never on the event loop.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from transformers import PreTrainedTokenizerBase

from compute_node.chat_template import ChatTemplate, ChatTurn

MAX_CHAT_MESSAGES: Final = 4096


@dataclass(frozen=True)
class TextPrompt:
    """Tokenized as it is, with the tokenizer's own special tokens."""

    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """Rendered with the model's chat template, ready for the assistant's answer.

    Attributes:
        turns: the messages so far.
        tools: what the assistant may call, each a JSON schema as chat templates want it.
    """

    turns: tuple[ChatTurn, ...]
    tools: tuple[Mapping[str, object], ...] = ()


@dataclass(frozen=True)
class TokenPrompt:
    """Taken as it is."""

    token_ids: tuple[int, ...]


Prompt: TypeAlias = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True)
class PromptLimits:
    """What a prompt may be.

    Attributes:
        vocab_size: rows of the model's embedding.
        max_context_tokens: longest prompt plus answer.
        max_prompt_bytes: longest text, in UTF-8.
    """

    vocab_size: int
    max_context_tokens: int
    max_prompt_bytes: int


class PromptCodec:
    """Encodes prompts and decodes answers.

    Args:
        tokenizer: the model's own.
        limits: what a prompt may be.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limits: PromptLimits) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._limits = limits
        # Fast tokenizers drop their file's truncation and padding at the first call, and must not do so while another
        # thread is encoding.
        self._encode_text("", special_tokens=True)

    @property
    def limits(self) -> PromptLimits:
        """What a prompt may be."""
        return self._limits

    @property
    def template(self) -> ChatTemplate:
        """How chats become text."""
        return self._template

    def check_ids(self, token_ids: Iterable[int], field: str) -> None:
        """Raises ValueError for a token that is not in the vocabulary; the text names `field`."""
        for token_id in token_ids:
            if not 0 <= token_id < self._limits.vocab_size:
                raise ValueError(f"{field} has {token_id}; allowed: 0 to {self._limits.vocab_size - 1}")

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's tokens, at least one.

        Raises:
            ValueError: the prompt is empty, too long, or not what the chat template or the vocabulary allows.
        """
        self._check_size(prompt)
        token_ids = prompt.token_ids if isinstance(prompt, TokenPrompt) else await self.tokenize(prompt)
        if not token_ids:
            raise ValueError("prompt is empty; at least one token is needed")
        if len(token_ids) >= self._limits.max_context_tokens:
            raise ValueError(
                f"prompt has {len(token_ids)} tokens; allowed: fewer than the context's "
                f"{self._limits.max_context_tokens}, so that at least one token of an answer fits"
            )
        self.check_ids(token_ids, "prompt.token_ids")
        return token_ids

    async def tokenize(self, prompt: TextPrompt | ChatPrompt) -> tuple[int, ...]:
        """The text's tokens, possibly none; the context's length does not matter here.

        Raises:
            ValueError: too many bytes, or not what the chat template allows.
        """
        self._check_size(prompt)
        return await asyncio.to_thread(self._tokenize, prompt)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The tokens as one text.

        Raises:
            ValueError: a token that is not in the vocabulary, or more tokens than the longest prompt text can have.
        """
        most = self._limits.max_prompt_bytes
        if len(token_ids) > most:
            raise ValueError(f"token_ids has {len(token_ids)} entries; allowed: at most {most}")
        return await asyncio.to_thread(self._detokenize, token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The answer's tokens as one text, without special tokens."""
        return self._decode(token_ids, skip_special_tokens=True)

    def is_shown(self, text: str) -> bool:
        """True when this text would be in an answer if the model wrote it; special tokens are left out."""
        return text in self.decode(self._encode_text(text, special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """One token for people to look at, special tokens included."""
        return self._decode([token_id], skip_special_tokens=False)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str), "one sequence decodes to one text"
        return text

    def _check_size(self, prompt: Prompt) -> None:
        if isinstance(prompt, TokenPrompt):
            return
        texts = [prompt.text] if isinstance(prompt, TextPrompt) else _texts_of(prompt)
        # A character takes at least one byte: what is too long by far is refused without being encoded.
        nbytes = sum(map(len, texts))
        if nbytes <= self._limits.max_prompt_bytes:
            nbytes = sum(map(_nbytes_of, texts))
        if nbytes > self._limits.max_prompt_bytes:
            raise ValueError(f"prompt has {nbytes} bytes or more; allowed: at most {self._limits.max_prompt_bytes}")
        if not any(texts):
            raise ValueError("prompt is empty; allowed: a text, a chat with text in at least one message, or token ids")

    def _detokenize(self, token_ids: Sequence[int]) -> str:
        self.check_ids(token_ids, "token_ids")
        return self.decode(token_ids)

    def _tokenize(self, prompt: TextPrompt | ChatPrompt) -> tuple[int, ...]:
        if isinstance(prompt, TextPrompt):
            return self._encode_text(prompt.text, special_tokens=True)
        return self._encode_text(self._template.render(prompt.turns, prompt.tools), special_tokens=False)

    def _encode_text(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        # `verbose` would warn about texts longer than the model's context, which are refused elsewhere.
        token_ids = self._tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
        assert isinstance(token_ids, list), "one text encodes to one list"
        return tuple(int(token_id) for token_id in token_ids)


def _nbytes_of(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt has {text[error.start]!a}, which is half a character") from error


def _texts_of(chat: ChatPrompt) -> list[str]:
    calls = [text for turn in chat.turns for call in turn.tool_calls for text in (call.name, call.arguments_json)]
    return [
        *(turn.content for turn in chat.turns),
        *calls,
        *(json.dumps(tool, ensure_ascii=False) for tool in chat.tools),
    ]
