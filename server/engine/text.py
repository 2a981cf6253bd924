"""Tokens to text, a token at a time: never half a character, never half a stop sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out; incomplete UTF-8 decodes to U+FFFD."""

_INCOMPLETE = "\ufffd"
_MAX_HELD = 3
"""A UTF-8 character has at most four bytes, so at most three tokens can be waiting for the rest of theirs."""

_MAX_WINDOW = 64
"""Tokens decoded at a time, whatever they are: beyond it, what is held back is given out as it stands."""

_MAX_SILENT = 16
"""Tokens of the window beyond which those without text of their own are dropped."""


class Detokenizer:
    """Incremental decoding over a sliding window.

    A token's text can depend on the tokens before it (spaces, byte fallback), so each push decodes a short window and
    takes what is new. While the text ends in U+FFFD, the last tokens may be a character that is not complete yet:
    nothing is given out before they are settled, by the next tokens, by their number, or by `flush`.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0  # leading tokens of the window whose text is out already
        self._shown = ""  # text of the window that is out already

    def push(self, token: int) -> str:
        """The text that became final with this token; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text == self._shown:
            if len(self._window) > _MAX_SILENT:
                self._window.pop()
            return ""  # a special token; or a space that shows only before the next word
        if not text.endswith(_INCOMPLETE) or len(self._window) > _MAX_WINDOW:
            new = self._since(text, len(self._window))
            self._slide()
            return new
        if len(self._window) - self._context > _MAX_HELD:
            return self._settle()
        return ""

    def flush(self) -> str:
        """What was held back, as it stands at the end of the answer."""
        new = self._since(self._decode(self._window), len(self._window))
        self._slide()
        return new

    def _since(self, text: str, end: int) -> str:
        """What is new in the text of window[:end].

        Byte fallback decodes a run of bytes as a whole: one that turns out to be no text takes characters back that
        were out already. Then the tokens that are new are decoded by themselves.
        """
        if text.startswith(self._shown) or _INCOMPLETE not in text:
            return text[len(self._shown) :]
        return self._decode(self._window[self._context : end])

    def _settle(self) -> str:
        """Give out all but the last tokens: too many wait to be one character."""
        end = len(self._window) - _MAX_HELD
        text = self._decode(self._window[:end])
        new = self._since(text, end)
        if text.startswith(self._shown):
            self._shown = text
        else:
            del self._window[:end]
            self._context, self._shown = 0, ""
        return new

    def _slide(self) -> None:
        """Keep the tokens since the last slide as context for the next ones, drop those before."""
        del self._window[: self._context]
        self._context = len(self._window)
        self._shown = self._decode(self._window)


class StopMatcher:
    """Finds the first of several stop sequences in a growing text, and holds back what may yet become one."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self._sequences = tuple(sequences)
        self._longest = max(map(len, self._sequences), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """(text that is safe to show, the stop sequence found or ""). The safe text ends before the stop sequence."""
        if not self._sequences:
            return text, ""
        self._held += text
        found = [(at, -len(stop), stop) for stop in self._sequences if (at := self._held.find(stop)) >= 0]
        if found:
            at, _, stop = min(found)
            safe, self._held = self._held[:at], ""
            return safe, stop
        keep = self._partial()
        safe = self._held[: len(self._held) - keep]
        self._held = self._held[len(safe) :]
        return safe, ""

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _partial(self) -> int:
        """Length of the longest end of the held text that begins some stop sequence."""
        for length in range(min(len(self._held), self._longest - 1), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._sequences):
                return length
        return 0


class OutputText:
    """One answer's text: detokenized, cut at a stop sequence."""

    def __init__(self, decode: Decode, stop_sequences: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._detokenizer = Detokenizer(decode)
        self._matcher = StopMatcher(stop_sequences)
        self._include_stop = include_stop
        self.stop_sequence = ""

    def push(self, token: int, *, may_stop: bool = True) -> tuple[str, str]:
        """(the token's own text, the answer's text that became final).

        `stop_sequence` is set once one is complete; text that came while `may_stop` was false is never part of one.
        """
        piece = self._detokenizer.push(token)
        return piece, self._take(piece) if may_stop else piece

    def flush(self, *, may_stop: bool = True) -> str:
        """The rest of the answer's text at its end: a stop sequence may yet be found in it, as by `push`."""
        rest = self._detokenizer.flush()
        final = self._take(rest) if may_stop else rest
        return final if self.stop_sequence else final + self._matcher.flush()

    def _take(self, piece: str) -> str:
        safe, stop = self._matcher.push(piece)
        if stop:
            self.stop_sequence = stop
            return safe + stop if self._include_stop else safe
        return safe
