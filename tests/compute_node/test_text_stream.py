"""Streamed text against the text of all tokens at once."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compute_node.prompt import PromptCodec, PromptLimits
from compute_node.text_stream import Detokenizer, StopMatcher, TextStream
from tests.compute_node.tiny_serving import load_tokenizer


class ByteTokens:
    """A tokenizer whose tokens are arbitrary byte strings, so that characters may be split anywhere."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.tokens[token_id] for token_id in token_ids).decode("utf-8", errors="replace")


def cut_at_first_stop(text: str, stop_strings: Sequence[str]) -> tuple[str, str | None]:
    """The stop string that is complete first, and of those that end together the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    borders = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(borders)]


texts = st.text(alphabet="abc \n.\u00e9\u6f22\U0001f600", max_size=40)
stops = st.lists(st.text(alphabet="abc \u00e9\U0001f600", min_size=1, max_size=4), max_size=3)
cut_points = st.lists(st.integers(0, 200), max_size=60)


@given(text=texts, stop_strings=stops, cuts=cut_points)
def test_any_split_gives_the_text_up_to_the_first_stop(text: str, stop_strings: list[str], cuts: list[int]) -> None:
    decoder = ByteTokens(split(text.encode(), cuts))
    stream = TextStream(decoder, stop_strings)
    shown, found = "", None
    for token_id in range(len(decoder.tokens)):
        piece = stream.push(token_id)
        shown += piece.text
        assert "\ufffd" not in piece.text
        found = piece.stop_string
        if found is not None:
            break
    if found is None:
        rest = stream.flush()
        shown, found = shown + rest.text, rest.stop_string
    assert (shown, found) == cut_at_first_stop(text, stop_strings)


@given(data=st.binary(max_size=30), cuts=cut_points)
def test_broken_bytes_come_out_as_they_decode_at_once(data: bytes, cuts: list[int]) -> None:
    decoder = ByteTokens(split(data, cuts))
    detokenizer = Detokenizer(decoder)
    shown = "".join(detokenizer.push(token_id) for token_id in range(len(decoder.tokens))) + detokenizer.flush()
    assert shown == data.decode("utf-8", errors="replace")


@given(text=texts, stop_strings=stops, cuts=cut_points)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stop_strings: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stop_strings)
    received, shown = "", ""
    for piece in (part.decode(errors="ignore") for part in split(text.encode(), cuts)):
        received += piece
        new, found = matcher.push(piece)
        shown += new
        if found is not None:
            return
        held = received[len(shown) :]
        assert received == shown + held
        assert held == "" or any(stop.startswith(held) for stop in stop_strings)
    assert shown + matcher.flush() == received


@pytest.mark.parametrize(
    "text",
    [
        "the sand and the sea",
        "  two  spaces  ",
        "caf\u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u6f22\u5b57",
        "<|im_end|>after",
    ],
)
def test_a_real_tokenizer_streams_what_it_decodes(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tmp_path)
    codec = PromptCodec(tokenizer, PromptLimits(10**6, 10**6, 10**6))
    token_ids = tokenizer(text)["input_ids"]
    stream = TextStream(codec, ())
    shown = "".join(stream.push(token_id).text for token_id in token_ids) + stream.flush().text
    assert shown == codec.decode(token_ids)
    assert shown == text.replace("<|im_end|>", "")


def test_the_longest_of_two_that_end_together_is_reported() -> None:
    assert StopMatcher(["b", "ab"]).push("xab") == ("x", "ab")


def test_the_one_that_is_complete_first_wins_over_the_one_that_starts_first() -> None:
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", "bc")
