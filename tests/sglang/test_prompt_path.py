"""From a request to token ids, and from the model's tokens to an answer, through the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from support.prompt_path import BAD_MEDIA, HOSTILE_BODIES, assert_bad_medium_is_answered, assert_same_token_ids
from support.scripted import CASES, Case, parsed, streamed
from support.server import Server
from support.sglang_scripted import Scripted

from k26_plugins.common.prompt.tokenizer import KimiTokenizer


def script(folder: Path, case: Case) -> dict[str, Any]:
    tokenizer = KimiTokenizer(folder)
    token_ids = [*tokenizer.encode_prompt(case.answer), tokenizer.named["<|im_end|>"]]
    return {"custom_logit_processor": Scripted.to_str(), "custom_params": {"script": token_ids}}


def test_the_parsers_are_chosen(scripted_server: Server) -> None:
    assert "reasoning parser kimi_k2, tool-call parser kimi_k2" in scripted_server.log.read_text()


def test_token_ids_are_the_cores(scripted_server: Server, tiny_folder: Path) -> None:
    assert_same_token_ids(scripted_server, tiny_folder)


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_a_bad_medium_is_answered_and_the_server_lives(scripted_server: Server, name: str) -> None:
    assert_bad_medium_is_answered(scripted_server, name)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_taken_apart(scripted_server: Server, tiny_folder: Path, name: str) -> None:
    case = CASES[name]
    expected = (case.reasoning, case.content, case.calls)
    *found, finish = parsed(scripted_server, case, script(tiny_folder, case))
    assert tuple(found) == expected
    assert finish == ("tool_calls" if case.calls else "stop")
    assert streamed(scripted_server, case, script(tiny_folder, case)) == expected


@given(HOSTILE_BODIES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_request_breaks_the_server(scripted_server: Server, body: dict[str, Any]) -> None:
    response = scripted_server.post("/v1/chat/completions", **{"max_tokens": 1, **body})
    assert response.status_code < 500, response.text
    assert scripted_server.alive()
