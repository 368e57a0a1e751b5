"""Tests two real agents, one of pydantic-ai and Moonshot's Kimi Code, against an engine's server with scripted answers.

The agents run as their users run them, in a separate environment that `ci/install_clients.py` builds, because the
versions that they need are not those that the engines pin.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.clients.turns import TURNS, ScriptedTests, Turn
from support.conversations import Conversation, core_token_ids
from support.images import png, random_image
from support.relay import Relay, relay
from support.server import Server

CLIENTS = os.environ.get("K26_CLIENTS", "")
PICTURE = "北京.png"
REPORT = {"city": "北京", "warm": True}
# The server constrains these answers by a grammar, which allows calls that fit their schemas and the answer that fits
# its schema, but no other text.
PYDANTIC_TURNS = (
    replace(TURNS[0], content="", nothing="{}"),
    replace(TURNS[1], nothing="{}"),
    Turn("Now I know.", json.dumps(REPORT, ensure_ascii=False), {}, ()),
)
KIMI_TURNS = (
    Turn(
        "Two at once.",
        "I look at both.",
        {"functions.ReadMediaFile:0": ("ReadMediaFile", {"path": PICTURE}), "functions.GetGoal:1": ("GetGoal", {})},
        (),
    ),
    Turn("No such file.", "", {"functions.ReadMediaFile:2": ("ReadMediaFile", {"path": "nowhere.png"})}, ()),
    Turn("Now I know.", "北京 is warm.", {}, ()),
)
# Two of Kimi Code's tools: the descriptions of all of them would take 50,000 of the tiny tokenizer's tokens.
KIMI_AGENT = """---
name: tester
description: Looks at pictures.
tools: [ReadMediaFile, GetGoal]
---
You look at pictures.
"""


@pytest.mark.skipif(not CLIENTS, reason="K26_CLIENTS names no environment of clients: see ci/install_clients.py")
class AgentTests(ScriptedTests):
    @pytest.mark.parametrize("how", ["whole", "streamed"])
    def test_pydantic_ai(self, server: Server, tiny_folder: Path, tmp_path: Path, how: str) -> None:
        """An agent offers tools together with a schema for its answer, and the tools return an error and an image."""
        (tmp_path / PICTURE).write_bytes(png(random_image(60, 40)))
        script = Path(__file__).with_name("pydantic_agent.py")
        with relay(server, [self.script(tiny_folder, turn.answer) for turn in PYDANTIC_TURNS]) as running:
            command = ["bin/python", str(script), f"{running.url}/v1", server.model, PICTURE, how]
            answer = json.loads(_run(command, tmp_path).splitlines()[-1])
        assert answer["output"] == REPORT
        # The agent calls all tools of a turn at once, each in its own thread, so their order is not fixed.
        assert sorted(map(repr, map(tuple, answer["called"]))) == sorted(map(repr, _calls(PYDANTIC_TURNS)))
        assert answer["thoughts"] == [turn.reasoning for turn in PYDANTIC_TURNS]
        _check(running, tiny_folder, PYDANTIC_TURNS, {})

    def test_kimi_code(self, server: Server, tiny_folder: Path, tmp_path: Path) -> None:
        """Kimi Code streams its requests, and asks that the reasoning of earlier turns be kept in the prompt."""
        (tmp_path / PICTURE).write_bytes(png(random_image(60, 40)))
        (tmp_path / "agent.md").write_text(KIMI_AGENT)
        with relay(server, [self.script(tiny_folder, turn.answer) for turn in KIMI_TURNS]) as running:
            settings = {
                "KIMI_CODE_HOME": str(tmp_path / "home"),
                "KIMI_CODE_NO_AUTO_UPDATE": "1",
                "KIMI_DISABLE_TELEMETRY": "1",
                "KIMI_MODEL_PROVIDER_TYPE": "kimi",
                "KIMI_MODEL_NAME": server.model,
                "KIMI_MODEL_BASE_URL": f"{running.url}/v1",
                "KIMI_MODEL_API_KEY": "none",
                "KIMI_MODEL_MAX_CONTEXT_SIZE": "12000",
                "KIMI_MODEL_MAX_COMPLETION_TOKENS": "500",
            }
            arguments = ["-p", "Is it warm in 北京?", "--agent-file", "agent.md", "--output-format", "stream-json"]
            lines = [json.loads(line) for line in _run(["kimi", *arguments], tmp_path, settings).splitlines()]
        said = [line for line in lines if line["role"] == "assistant"]
        assert [line.get("content") or "" for line in said] == [turn.content for turn in KIMI_TURNS]
        found = [one["function"] for line in said for one in line.get("tool_calls") or []]
        assert [(one["name"], json.loads(one["arguments"])) for one in found] == _calls(KIMI_TURNS)
        _check(running, tiny_folder, KIMI_TURNS, {"preserve_thinking": True})


def _run(command: list[str], folder: Path, settings: dict[str, str] | None = None) -> str:
    """Run a program of the clients' environment in `folder` and return what it prints.

    command: the program's path in that environment, then its arguments. settings: environment variables to add.
    """
    program, *arguments = command
    # The clients must not see the engine's environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
    done = subprocess.run(
        [str(Path(CLIENTS) / program), *arguments],
        cwd=folder,
        env={**environment, "HOME": str(folder), **(settings or {})},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _calls(turns: tuple[Turn, ...]) -> list[tuple[str, Any]]:
    return [call for turn in turns for call in turn.calls.values()]


def _check(running: Relay, folder: Path, turns: tuple[Turn, ...], options: dict[str, Any]) -> None:
    """Assert that the client sent back what the model thought, and that the model reads each request as the core
    renders it."""
    past = [message for message in running.requests[-1]["messages"] if message["role"] == "assistant"]
    thoughts = [message.get("reasoning") or message.get("reasoning_content") for message in past]
    assert thoughts == [turn.reasoning for turn in turns[:-1]]
    expected = [
        len(core_token_ids(folder, Conversation("agent", request["messages"], request["tools"], options)))
        for request in running.requests
    ]
    assert running.prompt_tokens() == expected
