"""The model's answer taken apart: reasoning, content and tool calls, from pieces cut anywhere.

An answer in thinking mode begins inside the think block. It ends the block with `</think>` or, without it, with a section of
tool calls (docs/model.md, 5.3); where `</think>` follows that section, the answer goes on behind it:

    reasoning</think>content<|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>…
    <|tool_calls_section_end|>

What a model writes beside this form is read as far as it has a meaning: a call without a section, a missing end, a marker
where none belongs. No marker becomes text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from k26_plugins.common.prompt.call_names import CallIds, Tools, tool_by_arguments, tool_name

THINK_BEGIN = "<think>"
THINK_END = "</think>"
SECTION_BEGIN = "<|tool_calls_section_begin|>"
SECTION_END = "<|tool_calls_section_end|>"
CALL_BEGIN = "<|tool_call_begin|>"
CALL_ARGUMENTS = "<|tool_call_argument_begin|>"
CALL_END = "<|tool_call_end|>"
# What a parser must find in an answer's text: no other special token is to be shown for its sake.
MARKERS = (THINK_BEGIN, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END)


class Marker(str):
    """A marker that the model wrote as a control token, among pieces of text that may spell one."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next piece of the thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins."""

    index: int
    """Place of the call in this answer, from 0."""
    call_id: str
    """`functions.NAME:INDEX`; no other call of this answer has it."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a call's arguments."""

    index: int
    text: str
    """JSON as the model wrote it; all pieces of an ended call together are not empty."""


Event: TypeAlias = Reasoning | Content | CallStart | CallArguments


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    SECTION = auto()
    """The place between calls, and after the section: to a user who asked for calls the model has no more to say there."""
    HEADER = auto()
    ARGUMENTS = auto()


# What is a marker in text whose token ids are unknown: there a tag of thinking is more likely spelled than meant.
_IN_TEXT = {
    _State.REASONING: MARKERS,
    _State.CONTENT: tuple(marker for marker in MARKERS if marker != THINK_BEGIN),
    _State.SECTION: MARKERS,
    _State.HEADER: MARKERS,
    _State.ARGUMENTS: tuple(marker for marker in MARKERS if marker not in (THINK_BEGIN, THINK_END)),
}
_PATTERNS = {state: re.compile("|".join(map(re.escape, markers))) for state, markers in _IN_TEXT.items()}


class OutputParser:
    """Feed an answer's pieces, take events. Any way of cutting the same answer gives the same events, up to where texts are
    cut.

    White space at the end of the reasoning, around arguments, and alone in front of a section of calls is dropped.
    """

    def __init__(self, *, in_reasoning: bool, tools: Tools | None = None) -> None:
        """in_reasoning: the prompt opened the think block. tools: those declared, by which calls are named that the model
        did not name; None where no calls are asked for: then they are dropped, and text outside them is content. vLLM
        begins a grammar of the content where a section ends the thinking."""
        self._state = _State.REASONING if in_reasoning else _State.CONTENT
        self._thinks = in_reasoning
        self._tools = tools
        self._ids = CallIds()
        self._pending = ""
        self._space = ""
        self._header = ""
        self._name: str | None = None
        self._unnamed = ""
        self._started = False
        self._content_begun = False
        self.num_calls = 0

    def feed(self, text: str) -> list[Event]:
        """The events of the next piece of an answer whose token ids are unknown: its markers are found by their names."""
        events: list[Event] = []
        self._pending += text
        while match := _PATTERNS[self._state].search(self._pending):
            before, self._pending = self._pending[: match.start()], self._pending[match.end() :]
            events += self._text(before)
            events += self._marker(match.group())
        held = beginning_of_a_marker(self._pending, _IN_TEXT[self._state])
        ready = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(ready) :]
        events += self._text(ready)
        return events

    def feed_pieces(self, pieces: Iterable[str]) -> list[Event]:
        """The events of the next pieces of an answer, in which each marker is a `Marker` and all else is text."""
        return [
            event
            for piece in pieces
            for event in (self._marker(piece) if isinstance(piece, Marker) else self._text(piece))
        ]

    def finish(self) -> list[Event]:
        """The events of what was held back. A call that was cut stays as it is: without arguments it is none."""
        events = list(self._text(self._pending))
        self._pending = ""
        if self._state is _State.CONTENT and self._space:
            events.append(Content(self._space))
        if self._state is _State.ARGUMENTS and self._name is None and self._unnamed:
            events += self._end_call()
        self._space, self._state = "", _State.SECTION
        return events

    def _text(self, text: str) -> Iterator[Event]:
        if not text or (self._state is _State.SECTION and self._tools is not None):
            return
        if self._state is _State.HEADER:
            self._header += text
            return
        if self._state is _State.ARGUMENTS and not (self._started or self._unnamed):
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
        elif self._state in (_State.CONTENT, _State.SECTION):
            yield self._content(kept)
        elif self._name is None:
            self._unnamed += kept
        else:
            yield from self._arguments(kept)

    def _marker(self, marker: str) -> Iterator[Event]:
        if marker == THINK_END and self._thinks:
            if self._state is _State.ARGUMENTS:
                yield from self._end_call()
            self._thinks = False
            self._go(_State.CONTENT)
            return
        if marker in (CALL_ARGUMENTS, CALL_END) and self._state is _State.HEADER:
            self._begin_arguments()
        # A template of the user's may leave it to the model to open the block.
        if marker == THINK_BEGIN and self._state is _State.CONTENT and not self._content_begun:
            self._thinks = True
            self._go(_State.REASONING)
        ends_nothing = marker in (CALL_END, SECTION_END) and self._state in (_State.REASONING, _State.CONTENT)
        if ends_nothing or marker in (THINK_BEGIN, THINK_END, CALL_ARGUMENTS):
            return
        if self._state is _State.ARGUMENTS:
            yield from self._end_call()
        self._go(_State.HEADER if marker == CALL_BEGIN else _State.SECTION)
        self._header = ""

    def _go(self, state: _State) -> None:
        self._state, self._space = state, ""

    def _begin_arguments(self) -> None:
        self._go(_State.ARGUMENTS)
        self._header = self._header.strip()
        self._name = tool_name(self._header, self._tools or {})
        self._unnamed, self._started = "", False

    def _end_call(self) -> Iterator[Event]:
        if self._name is None:
            self._name = tool_by_arguments(self._unnamed, self._tools or {})
            if self._name is None:
                yield from self._lost_call()
                return
            yield from self._arguments(self._unnamed or "{}")
        elif not self._started:
            yield from self._arguments("{}")

    def _arguments(self, text: str) -> Iterator[Event]:
        """A call is told of with the first of its arguments: one that is cut before them was never written."""
        if self._tools is None:
            return
        if not self._started:
            self._started = True
            self.num_calls += 1
            name = self._name or ""
            yield CallStart(self.num_calls - 1, self._ids.take(self._header, name), name)
        yield CallArguments(self.num_calls - 1, text)

    def _lost_call(self) -> Iterator[Event]:
        """A call of no tool that can be told is content: an agent that got nothing would end in silence."""
        text = f"{self._header} {self._unnamed}".strip()
        if self._tools is not None and text:
            yield self._content("\n" + text if self._content_begun else text)

    def _content(self, text: str) -> Content:
        self._content_begun = True
        return Content(text)


def beginning_of_a_marker(text: str, markers: tuple[str, ...] = MARKERS) -> int:
    """Length of the longest end of `text` that a marker begins with."""
    start = max(0, len(text) - max(map(len, markers)) + 1)
    position = text.find("<", start)
    while position >= 0:
        if any(marker.startswith(text[position:]) for marker in markers):
            return len(text) - position
        position = text.find("<", position + 1)
    return 0
