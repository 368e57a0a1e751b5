"""Parse the model's answer into reasoning, content and tool calls, from streaming chunks that may be cut anywhere.

An answer in thinking mode begins inside the think block. The block ends with `</think>` or, without it, with a section
of tool calls (docs/model.md, 5.3); if `</think>` follows that section, the answer continues after it:

    reasoning</think>content<|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>…
    <|tool_calls_section_end|>

The parser also accepts other forms as far as they have a meaning: a call without a section, a missing end, a marker in
an unexpected place. It never passes a marker on as text.
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
# The control tokens that structure an answer. The parser needs only these in an answer's text, no other special tokens.
MARKERS = (THINK_BEGIN, THINK_END, SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENTS, CALL_END)


class Marker(str):
    """A marker that the model wrote as a control token, among pieces of text that may spell a marker."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The next piece of the reasoning content."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """The next piece of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The start of a tool call."""

    index: int
    """Index of the call in this answer, from 0."""
    call_id: str
    """`functions.NAME:INDEX`, unique within this answer."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of a tool call's arguments."""

    index: int
    text: str
    """JSON as the model wrote it. The joined pieces of a call that has ended are never empty."""


Event: TypeAlias = Reasoning | Content | CallStart | CallArguments


class _State(Enum):
    REASONING = auto()
    CONTENT = auto()
    SECTION = auto()
    """Between calls, and after the section.

    If the request declares tools, the parser drops text in this state, because a client that gets tool calls expects no
    further content.
    """
    HEADER = auto()
    ARGUMENTS = auto()


# The markers that count in text whose token ids are unknown. `<think>` does not count in content, and neither tag of
# thinking counts in arguments, because there the model more likely quotes the tag.
_IN_TEXT = {
    _State.REASONING: MARKERS,
    _State.CONTENT: tuple(marker for marker in MARKERS if marker != THINK_BEGIN),
    _State.SECTION: MARKERS,
    _State.HEADER: MARKERS,
    _State.ARGUMENTS: tuple(marker for marker in MARKERS if marker not in (THINK_BEGIN, THINK_END)),
}
_PATTERNS = {state: re.compile("|".join(map(re.escape, markers))) for state, markers in _IN_TEXT.items()}


class OutputParser:
    """A state machine that takes the pieces of one answer and returns events.

    However an answer is cut into pieces, the events are the same, except for where their texts are cut. White space at
    the end of the reasoning, around arguments, and alone before a section of calls is dropped.

    Examples:
        A marker may be cut between two chunks:

        >>> parser = OutputParser(in_reasoning=True)
        >>> parser.feed("One and one.</th")
        [Reasoning(text='One and one.')]
        >>> parser.feed("ink>2") + parser.finish()
        [Content(text='2')]
    """

    def __init__(self, *, in_reasoning: bool, tools: Tools | None = None) -> None:
        """Start before an answer's first piece.

        in_reasoning: the prompt opened the think block. tools: the declared tools, which serve to name calls that the
        model did not name. None means that no calls are asked for: calls are dropped, and text between and after them
        is content, because vLLM starts the grammar of the content where a section of calls ends the reasoning.
        """
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
        """Return the events of the next text of an answer whose token ids are unknown.

        Markers are found by their names.
        """
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
        """Return the events of the next pieces of an answer whose token ids are known.

        Only a `Marker` counts as a marker; everything else is text.
        """
        return [
            event
            for piece in pieces
            for event in (self._marker(piece) if isinstance(piece, Marker) else self._text(piece))
        ]

    def finish(self) -> list[Event]:
        """Return the events of the text that was held back, at the end of the answer.

        A call that was cut off stays incomplete; one that was cut before its arguments is no call.
        """
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
        # White space at the end is held back until it is known what follows.
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
        # A user's own template may leave it to the model to open the think block.
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
        """Yield a piece of a call's arguments, and before the first piece the start of the call.

        A call that is cut before its arguments is therefore never reported.
        """
        if self._tools is None:
            return
        if not self._started:
            self._started = True
            self.num_calls += 1
            name = self._name or ""
            yield CallStart(self.num_calls - 1, self._ids.take(self._header, name), name)
        yield CallArguments(self.num_calls - 1, text)

    def _lost_call(self) -> Iterator[Event]:
        """Yield, as content, a call whose tool cannot be determined.

        If the call were dropped, an agent would get an empty answer and stop.
        """
        text = f"{self._header} {self._unnamed}".strip()
        if self._tools is not None and text:
            yield self._content("\n" + text if self._content_begun else text)

    def _content(self, text: str) -> Content:
        self._content_begun = True
        return Content(text)


def beginning_of_a_marker(text: str, markers: tuple[str, ...] = MARKERS) -> int:
    """Return the length of the longest suffix of `text` that a marker begins with, 0 if there is none."""
    start = max(0, len(text) - max(map(len, markers)) + 1)
    position = text.find("<", start)
    while position >= 0:
        if any(marker.startswith(text[position:]) for marker in markers):
            return len(text) - position
        position = text.find("<", position + 1)
    return 0
