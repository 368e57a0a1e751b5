"""A test of `vllm run-batch`, which has no server, but renders prompts and parses answers as a server does."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.conversations import Conversation, core_token_ids
from support.scripted import TOOLS
from support.server import python_path
from support.vllm_scripted import script


@pytest.mark.long
def test_a_batch_file(tiny_folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Is it warm in 北京?"}]
    call = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    answer = f"r</think>ok<|tool_calls_section_begin|>{call}<|tool_calls_section_end|>"
    body = {"model": "m", "messages": messages, "tools": TOOLS, "max_tokens": 200, **script(tiny_folder, answer)}
    request = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(request) + "\n")
    command = ["vllm", "run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    command += ["--model", str(tiny_folder), "--served-model-name", "m", "--enforce-eager", "--max-model-len", "4096"]
    command += ["--kv-cache-memory-bytes", str(2**28), "--logits-processors", "support.vllm_scripted:Scripted"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": python_path()}, timeout=400)
    response = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]
    message = response["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("r", "ok")
    assert [(one["id"], one["function"]["name"]) for one in message["tool_calls"]] == [("functions.now:0", "now")]
    assert response["usage"]["prompt_tokens"] == len(
        core_token_ids(tiny_folder, Conversation("batch", messages, TOOLS))
    )
