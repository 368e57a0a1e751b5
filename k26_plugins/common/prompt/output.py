"""The model's answer taken apart: reasoning, content and tool calls, from text that arrives in pieces cut anywhere.

An answer in thinking mode begins inside the think block. It ends the block with `</think>` or, without it, with a section of
tool calls (specification 5.3):

    reasoning</think>content<|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>…
    <|tool_calls_section_end|>
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

THINK_BEGIN = "<think>"
THINK_END = "</think>"
SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
CALL_ARGUMENTS = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
# What a parser must find in an answer's text: no other special token is to be shown for its sake.
MARKERS = (THINK_BEGIN, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END)

# Names may hold dots, hyphens and colons; the last colon is the index'.
_CALL_ID = re.compile(r"(?:functions\.)?(?P<name>\S.*):\d+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    """Place of the call in this answer, from 0."""
    call_id: str
    """As the model wrote it."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str
    """The next piece of the arguments, JSON as the model wrote it; all pieces of an ended call together are not empty."""


Event: TypeAlias = Reasoning | Content | CallStart | CallArguments


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    SECTION = auto()
    """Between calls, and after the section: the model has no more to say that belongs to a user."""
    HEADER = auto()
    ARGUMENTS = auto()


_MARKERS = {
    _State.REASONING: (THINK_BEGIN, THINK_END, SECTION_BEGIN),
    _State.CONTENT: (THINK_END, SECTION_BEGIN),
    _State.SECTION: (CALL_BEGIN, SECTION_BEGIN, SECTION_END),
    _State.HEADER: (CALL_ARGUMENTS, CALL_BEGIN, CALL_END, SECTION_END),
    _State.ARGUMENTS: (CALL_END, CALL_BEGIN, SECTION_END),
}
_PATTERNS = {state: re.compile("|".join(map(re.escape, markers))) for state, markers in _MARKERS.items()}


class OutputParser:
    """Feed text, take events. Any way of cutting the same text gives the same events, up to where texts are cut.

    White space at the end of the reasoning, around arguments, and alone in front of a section of calls is dropped.
    """

    def __init__(self, *, in_reasoning: bool, parameters: Mapping[str, Collection[str]] | None = None) -> None:
        """in_reasoning: the prompt opened the think block. parameters: of each tool, by name, to name a call by what it
        passes where the model gives a bare number."""
        self._state = _State.REASONING if in_reasoning else _State.CONTENT
        self._parameters = parameters or {}
        self._pending = ""
        self._space = ""
        self._header = ""
        self._unnamed = ""
        self._named = False
        self._empty = True
        self._content_begun = False
        self.num_calls = 0

    def feed(self, text: str) -> list[Event]:
        """The events of the next piece of the answer."""
        events: list[Event] = []
        self._pending += text
        while match := _PATTERNS[self._state].search(self._pending):
            before, self._pending = self._pending[: match.start()], self._pending[match.end() :]
            events += self._text(before)
            events += self._marker(match.group())
        held = _beginning_of_a_marker(self._pending, _MARKERS[self._state])
        ready = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(ready) :]
        events += self._text(ready)
        return events

    def finish(self) -> list[Event]:
        """The events of what was held back. A call that was cut stays as it is, without one that has no name yet."""
        events = list(self._text(self._pending))
        self._pending = ""
        if self._state is _State.CONTENT and self._space:
            events.append(Content(self._space))
            self._space = ""
        return events

    def _text(self, text: str) -> Iterator[Event]:
        if not text or self._state is _State.SECTION:
            return
        if self._state is _State.HEADER:
            self._header += text
            return
        if self._state is _State.ARGUMENTS and self._empty:
            text = text.lstrip()
        whole = self._space + text
        # White space waits for what follows it.
        kept = whole.rstrip()
        if self._state is _State.CONTENT and (kept or self._content_begun):
            kept = whole
        self._space = whole[len(kept) :]
        if not kept:
            return
        if self._state is _State.REASONING:
            yield Reasoning(kept)
        elif self._state is _State.CONTENT:
            self._content_begun = True
            yield Content(kept)
        else:
            self._empty = False
            if self._named:
                yield CallArguments(self.num_calls - 1, kept)
            else:
                self._unnamed += kept

    def _marker(self, marker: str) -> Iterator[Event]:
        if self._state is _State.ARGUMENTS:
            yield from self._end_call()
        self._space = ""
        if marker == THINK_END:
            self._state = _State.CONTENT
        elif marker == CALL_BEGIN:
            self._state, self._header = _State.HEADER, ""
        elif marker == CALL_ARGUMENTS:
            self._state, self._empty, self._unnamed = _State.ARGUMENTS, True, ""
            match = _CALL_ID.fullmatch(self._header.strip())
            self._named = match is not None
            if match:
                yield self._start_call(match["name"])
        elif marker != THINK_BEGIN:
            self._state = _State.SECTION

    def _start_call(self, name: str) -> CallStart:
        self.num_calls += 1
        return CallStart(self.num_calls - 1, self._header.strip(), name)

    def _end_call(self) -> Iterator[Event]:
        if not self._named:
            name = self._name_by_arguments()
            if name is None:
                return
            yield self._start_call(name)
            if self._unnamed:
                yield CallArguments(self.num_calls - 1, self._unnamed)
        if self._empty:
            yield CallArguments(self.num_calls - 1, "{}")

    def _name_by_arguments(self) -> str | None:
        """The only tool, or the one whose parameters fit the arguments best; None where nothing fits."""
        header = self._header.strip()
        if header and not header.isdigit():
            return None
        if len(self._parameters) == 1:
            return next(iter(self._parameters))
        try:
            passed = set(json.loads(self._unnamed or "{}"))
        except (ValueError, TypeError):
            return None
        fits = {
            name: len(passed & set(known)) - len(passed - set(known))
            for name, known in self._parameters.items()
            if known
        }
        best = max(fits, key=fits.__getitem__, default=None)
        return best if best is not None and fits[best] > 0 else None


def _beginning_of_a_marker(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that a marker begins with."""
    start = max(0, len(text) - max(map(len, markers)) + 1)
    position = text.find("<", start)
    while position >= 0:
        if any(marker.startswith(text[position:]) for marker in markers):
            return len(text) - position
        position = text.find("<", position + 1)
    return 0
