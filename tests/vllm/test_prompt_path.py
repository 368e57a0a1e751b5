"""From a request to token ids, and from the model's tokens to an answer, through the real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from support.prompt_path import BAD_MEDIA, HOSTILE_BODIES, assert_bad_medium_is_answered, assert_same_token_ids
from support.scripted import CASES, parsed, streamed
from support.server import Server, python_path
from support.vllm_scripted import script
from support.vllm_server import serve


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    scripted = ("--logits-processors", "support.vllm_scripted:Scripted")
    with serve(tiny_folder, log, "--enforce-eager", *scripted, PYTHONPATH=python_path()) as running:
        yield running


def test_the_parsers_are_chosen(server: Server) -> None:
    assert "reasoning parser kimi_k2, tool-call parser k26" in server.log.read_text()


def test_token_ids_are_the_cores(server: Server, tiny_folder: Path) -> None:
    assert_same_token_ids(server, tiny_folder)


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_a_bad_medium_is_answered_and_the_server_lives(server: Server, name: str) -> None:
    assert_bad_medium_is_answered(server, name)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_taken_apart(server: Server, tiny_folder: Path, name: str) -> None:
    case = CASES[name]
    expected = (case.reasoning, case.content, case.calls)
    *found, finish = parsed(server, case, script(tiny_folder, case.answer))
    assert tuple(found) == expected
    assert finish == ("tool_calls" if case.calls else "stop")
    assert streamed(server, case, script(tiny_folder, case.answer)) == expected


@given(HOSTILE_BODIES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(server: Server, body: dict[str, Any]) -> None:
    response = server.post("/v1/chat/completions", **{"max_tokens": 1, **body})
    assert response.status_code < 500, response.text
    assert server.alive()
