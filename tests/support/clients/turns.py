"""Defines the turns of an agent loop, the model's answers and the tools' results, for the tests of all APIs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from support.images import image_part, png, random_image
from support.scripted import TOOLS, call
from support.server import Server

from k26_plugins.common.prompt.output import CALL_ARGUMENTS, CALL_BEGIN, SECTION_BEGIN, SECTION_END, THINK_END
from k26_plugins.common.prompt.tokenizer import KimiTokenizer

IMAGE = image_part(png(random_image(60, 40)))
FUNCTIONS: list[Any] = [tool["function"] for tool in TOOLS]
QUESTION: dict[str, Any] = {"role": "user", "content": [IMAGE, {"type": "text", "text": "Is it warm in 北京?"}]}
ERROR = "Error: the clock does not answer"


@dataclass(frozen=True)
class Turn:
    """An answer of the model, and the results of the tools that it calls."""

    reasoning: str
    content: str
    calls: dict[str, tuple[str, Any]]
    """The name and the arguments of each call, by the call's id."""
    results: tuple[Any, ...]
    """The content of each call's result, in the order of the calls."""
    nothing: str = ""
    """How the model writes empty arguments."""

    @property
    def answer(self) -> str:
        """The answer as the model writes it."""
        written = "".join(
            call(call_id, json.dumps(arguments, ensure_ascii=False) if arguments else self.nothing)
            for call_id, (_, arguments) in self.calls.items()
        )
        return f"{self.reasoning}{THINK_END}{self.content}" + (
            f"{SECTION_BEGIN}{written}{SECTION_END}" if written else ""
        )

    def in_chat(self) -> list[dict[str, Any]]:
        """Return the answer and its calls' results as messages of a chat."""
        calls = [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for call_id, (name, arguments) in self.calls.items()
        ]
        answer = {"role": "assistant", "content": self.content, "reasoning": self.reasoning, "tool_calls": calls}
        results = zip(self.calls, self.results, strict=True)
        return [
            answer,
            *({"role": "tool", "tool_call_id": call_id, "content": result} for call_id, result in results),
        ]


TURNS = (
    Turn(
        "Two at once.",
        "I look at both.",
        {"functions.get_weather:0": ("get_weather", {"city": "北京"}), "functions.now:1": ("now", {})},
        ("22 °C, 晴", ERROR),
    ),
    # This result has the picture twice.
    Turn("Again.", "", {"functions.now:2": ("now", {})}, ([{"type": "text", "text": "12:30"}, IMAGE, IMAGE],)),
    Turn("Now I know.", "北京 is warm.", {}, ()),
)
CUT = f'why{THINK_END}ok{SECTION_BEGIN}{CALL_BEGIN}functions.now:0{CALL_ARGUMENTS}{{"city":"'


def tokens(folder: Path, text: str) -> int:
    """Return how many tokens the text has, with control tokens read as such."""
    return len(KimiTokenizer(folder).encode_prompt(text))


class ScriptedTests:
    """The base of tests whose requests order the model's answer."""

    def __init_subclass__(cls) -> None:
        """Refuse a class whose bases have two tests of one name, because pytest would run only the first."""
        names = [name for base in cls.__bases__ for name in vars(base) if name.startswith("test_")]
        assert len(names) == len(set(names)), f"two of the tests in {cls.__name__} have one name: {sorted(names)}"

    def script(self, folder: Path, answer: str) -> dict[str, Any]:
        """Return the request fields by which a server of the checkpoint in `folder` answers `answer` and then ends."""
        raise NotImplementedError


def openai_client(server: Server) -> openai.OpenAI:
    """Return OpenAI's client for the server, without retries."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def with_parts(picture: dict[str, Any], results: tuple[Any, ...], text: str) -> list[Any]:
    """Return the results with their pictures and texts in the form of another API.

    picture: IMAGE in that form. text: that API's name for the type of a text part.
    """
    return [
        [picture if part is IMAGE else {**part, "type": text} for part in result]
        if isinstance(result, list)
        else result
        for result in results
    ]
