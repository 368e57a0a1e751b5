"""Match an answer's text with its token ids, to find the markers that the model wrote as control tokens.

A model that quotes the format of answers writes a marker's name with ordinary tokens, and in the text both look alike.
The text comes from the engine: it may lag behind the ids, be cut at a stop string, and contain replacements for bytes
that are not valid UTF-8.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from k26_plugins.common.prompt.output import MARKERS, Marker, beginning_of_a_marker
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

_NAMES = re.compile("|".join(map(re.escape, MARKERS)))
_NAME_BYTES = re.compile(_NAMES.pattern.encode())
_LONGEST = max(map(len, MARKERS))


class TokenText:
    """The text of one answer with its token ids.

    Markers, whether control tokens or spelled, have the same order in both: the n-th in the text is the n-th among the
    ids.
    """

    def __init__(self, tokenizer: KimiTokenizer, *, special_shown: bool = False) -> None:
        """Start before an answer's first token.

        special_shown: the text contains the names of the other special tokens too.
        """
        self._tokenizer = tokenizer
        self._special_shown = special_shown
        self._markers = {tokenizer.special[name] for name in MARKERS}
        self.num_tokens = 0
        self._meant: deque[bool] = deque()
        self._spelled = b""
        self._pending = ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a whole answer, for an engine that gives none.

        Of the special tokens, it contains only the markers, or all with `special_shown`.
        """
        hidden = set() if self._special_shown else self._tokenizer.special_ids - self._markers
        return self._tokenizer.decode([token_id for token_id in token_ids if token_id not in hidden])

    def split(self, text: str, token_ids: Sequence[int]) -> list[str]:
        """Return the next text as pieces; each marker that the model wrote as a control token is a `Marker`.

        token_ids: the ids after those of earlier calls; all ids that `text` was decoded from must have been given by
        now.
        """
        self.num_tokens += len(token_ids)
        for token_id in token_ids:
            self._read(token_id)
        self._pending += text
        pieces: list[str] = []
        spelled = 0
        while match := _NAMES.search(self._pending, spelled):
            # A marker in text for which no ids were given is no control token.
            if self._meant and self._meant.popleft():
                pieces += [self._pending[: match.start()], Marker(match.group())]
                self._pending, spelled = self._pending[match.end() :], 0
            else:
                spelled = match.end()
        ready = len(self._pending) - beginning_of_a_marker(self._pending[spelled:])
        pieces.append(self._pending[:ready])
        self._pending = self._pending[ready:]
        return [piece for piece in pieces if piece]

    def shown(self, text: str, token_ids: Sequence[int], *, finished: bool) -> str:
        """Return the next text without markers, as a client of raw completions gets it. Arguments as for `split`."""
        pieces = self.split(text, token_ids)
        if finished:
            pieces += self.finish()
        return "".join(piece for piece in pieces if not isinstance(piece, Marker))

    def finish(self) -> list[str]:
        """Return the text that was held back because it might have become a marker."""
        rest, self._pending = self._pending, ""
        return [rest] if rest else []

    def _read(self, token_id: int) -> None:
        if token_id in self._markers:
            self._meant.append(True)
            self._spelled = b""
        elif token_id not in self._tokenizer.special_ids:
            self._spelled += self._tokenizer.token_bytes(token_id)
            end = 0
            for match in _NAME_BYTES.finditer(self._spelled):
                self._meant.append(False)
                end = match.end()
            self._spelled = self._spelled[max(end, len(self._spelled) - _LONGEST + 1) :]
        elif self._special_shown:
            self._spelled = b""
