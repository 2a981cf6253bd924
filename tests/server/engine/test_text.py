"""Tokens to text: whole characters, whole stop sequences, and the same text however it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from weft.server.engine.text import Detokenizer, OutputText, StopMatcher


def decode(ids: Sequence[int]) -> str:
    """A byte-level tokenizer: ids are bytes; 256 and above are special and have no text."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def pieces(text: OutputText, data: bytes) -> list[str]:
    return [text.push(byte)[1] for byte in data] + [text.flush()]


def test_a_character_comes_out_when_its_last_byte_does() -> None:
    assert pieces(OutputText(decode), "aé🙂".encode()) == ["a", "", "é", "", "", "", "🙂", ""]


@given(st.text())
def test_text_comes_back_whole_and_never_in_halves(text: str) -> None:
    parts = pieces(OutputText(decode), text.encode())
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


@given(st.binary(max_size=60))
def test_any_bytes_end_as_their_plain_decoding(data: bytes) -> None:
    assert "".join(pieces(OutputText(decode), data)) == data.decode(errors="replace")


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    text = Detokenizer(decode)
    shown = "".join(text.push(0xFF) for _ in range(1000))
    assert len(shown) >= 997
    assert len(shown + text.flush()) == 1000


def byte_fallback() -> Tokenizer:
    """Pieces of words, and a token a byte for everything else, as Llama 2, Mistral and Gemma have them."""
    words = ["▁Hello", "▁world", "▁a", "é", "!", "▁"]
    vocab = {token: i for i, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@settings(deadline=None)
@given(st.lists(st.sampled_from(["▁", "▁Hello", "▁world", "▁a", "é", "!", "😀", "日", "ñ", "𝄞"]), max_size=25))
def test_byte_fallback_gives_whole_characters(parts: list[str]) -> None:
    tokenizer = byte_fallback()
    ids: list[int] = []
    for part in parts:
        known = tokenizer.token_to_id(part)
        ids += part.encode() if known is None else [known]
    text = OutputText(tokenizer.decode)
    pieces = [text.push(token)[1] for token in ids] + [text.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_that_is_a_token_of_its_own_is_kept() -> None:
    tokenizer = byte_fallback()
    text = OutputText(tokenizer.decode)
    parts = ["▁", "▁Hello", "▁", "▁", "▁world"]
    ids = [tokenizer.token_to_id(part) for part in parts]
    assert "".join(text.push(token)[1] for token in ids) + text.flush() == tokenizer.decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 261), max_size=60))
def test_byte_fallback_bears_any_tokens(ids: list[int]) -> None:
    text = OutputText(byte_fallback().decode)
    for token in ids:
        text.push(token)
    text.flush()


def test_the_window_stays_short_whatever_comes() -> None:
    text = Detokenizer(decode)
    for token in [0xFF] * 500 + [300] * 500 + [0x61] * 500:
        text.push(token)
        assert len(text._window) <= 65


def test_special_tokens_have_no_text() -> None:
    text = OutputText(decode)
    assert [text.push(i)[1] for i in (104, 300, 105)] == ["h", "", "i"]


@pytest.mark.parametrize(
    ("stops", "text", "shown", "found"),
    [
        (["END"], "abcENDdef", "abc", "END"),
        (["END"], "abcEN", "abcEN", ""),
        (["aab"], "aaab", "a", "aab"),
        (["b", "abc"], "xabc", "xa", "b"),
        (["abc", "ab"], "xabc", "x", "ab"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["é"], "caféine", "caf", "é"),
    ],
)
def test_stop_sequences_are_found_across_tokens(stops: list[str], text: str, shown: str, found: str) -> None:
    output, got = OutputText(decode, stops), ""
    for byte in text.encode():
        got += output.push(byte)[1]
        if output.stop_sequence:
            break
    else:
        got += output.flush()
    assert (got, output.stop_sequence) == (shown, found)


def test_a_stop_sequence_is_shown_where_asked() -> None:
    output = OutputText(decode, ["b"], include_stop=True)
    assert [output.push(byte)[1] for byte in b"ab"] == ["a", "b"]


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("ab", max_size=30))
def test_the_matcher_agrees_with_a_search_of_the_whole(stops: list[str], text: str) -> None:
    matcher, shown, found = StopMatcher(stops), "", ""
    for letter in text:
        safe, found = matcher.push(letter)
        shown += safe
        if found:
            break
    else:
        shown += matcher.flush()
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert bool(found) == bool(ends)
    assert shown + found == text[: min(ends)] if ends else shown == text
