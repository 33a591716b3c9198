"""Where the prompts of a recording come from, and the threads that send them."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from promoe.client import Client, GenerationStream
from promoe.errors import InvalidInput, ModelNotFound, PromoeError
from promoe.generation import GenerateOptions, Prompt

PACKAGED: Final = "chat"
"""The name of the prompts that come with promoe."""


@dataclass(frozen=True)
class PromptItem:
    """One prompt. `is_document`: a text to go on with, cut to what the context has room for; else a chat question."""

    text: str
    is_document: bool = False


def packaged_prompts() -> list[PromptItem]:
    """A few hundred chat questions of many kinds."""
    text = resources.files("promoe.cli").joinpath("prompts.txt").read_text(encoding="utf-8")
    return [PromptItem(line) for line in text.splitlines() if line.strip()]


def read_prompts(source: str) -> list[PromptItem]:
    """The packaged prompts (`chat`), the lines of a file, or the text documents of a folder.

    Raises:
        ModelNotFound: there is no such file or folder.
        InvalidInput: there is nothing in it.
    """
    path = Path(source)
    if source == PACKAGED and not path.exists():
        return packaged_prompts()
    if path.is_dir():
        texts = [_read_text(file) for file in sorted(path.iterdir()) if file.is_file()]
        items = [PromptItem(text, is_document=True) for text in texts if text.strip()]
    elif path.exists():
        items = [PromptItem(line.strip()) for line in _read_text(path).splitlines() if line.strip()]
    else:
        raise ModelNotFound(
            f"There are no prompts at {source}: name a file with one per line, a folder of text documents, or "
            f"{PACKAGED!r} for those that come with promoe."
        )
    if not items:
        raise InvalidInput(f"{source} has no prompts.")
    return items


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is no UTF-8 text.") from None


class PromptSender:
    """Sends prompts one behind the other from a few threads, until they are through or somebody stops it.

    Args:
        client: of the node.
        items: what to send.
        options: of every request; the seed is counted up, so that answers differ and can be had again.
        num_threads: requests at a time.
    """

    def __init__(
        self, client: Client, items: Sequence[PromptItem], options: GenerateOptions, num_threads: int = 1
    ) -> None:
        self._client = client
        self._options = options
        self._queue: Iterator[tuple[int, PromptItem]] = iter(enumerate(items))
        self._lock = threading.Lock()
        self._streams: set[GenerationStream] = set()
        self._is_stopped = False
        self._failure: PromoeError | ValueError | None = None
        self.num_sent = 0
        self._threads = [threading.Thread(target=self._send_all, daemon=True) for _ in range(num_threads)]

    def start(self) -> None:
        """Begins to send."""
        for thread in self._threads:
            thread.start()

    @property
    def is_through(self) -> bool:
        """Nothing more will be sent. Raises what kept a prompt from being answered."""
        if self._failure is not None:
            raise self._failure
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Cancels what is under way and waits for the threads."""
        with self._lock:
            self._is_stopped = True
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _send_all(self) -> None:
        try:
            while (stream := self._next_stream()) is not None:
                stream.finish()
                with self._lock:
                    self._streams.discard(stream)
        except (PromoeError, ValueError) as error:
            self._failure = error

    def _next_stream(self) -> GenerationStream | None:
        with self._lock:
            index, item = next(self._queue, (0, None))
            if item is None or self._is_stopped:
                return None
            self.num_sent += 1
        options = self._options.copy()
        options["seed"] = options.get("seed", 0) + index
        stream = self._client.generate(self._prompt(item), **options)
        with self._lock:
            self._streams.add(stream)
            if self._is_stopped:
                stream.cancel()
        return stream

    def _prompt(self, item: PromptItem) -> Prompt:
        if not item.is_document:
            return [{"role": "user", "content": item.text}]
        limits = self._client.info().limits
        room = limits.max_context_tokens - self._options.get("max_tokens", 0)
        # A character has up to four bytes.
        return self._client.tokenize(item.text[: limits.max_prompt_bytes // 4])[: max(1, room)]
