"""Tests of the operator's `k26` commands in SGLang's environment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.conformance import call_to_order, holds_to_all
from support.doctor import doctor
from support.faults import LOCATED, causes
from support.server import Server
from support.sglang_scripted import FAULTS, Scripted, order

from k26_plugins.cli import app
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.prompt.tokenizer import KimiTokenizer
from k26_plugins.operate.plan.fit import kv_bytes_per_token
from k26_plugins.operate.plan.weights import Layout, per_gpu


def verify(server: Server, golden_file: Path) -> Result:
    return CliRunner().invoke(app, ["verify", "--url", server.url, "--golden", str(golden_file)])


def test_k26_serve_has_become_the_engine(scripted_server: Server) -> None:
    """`k26 serve` becomes the engine's process, so that signals and the exit status are the engine's."""
    running = Path(f"/proc/{scripted_server.pid}/cmdline").read_text().split("\0")
    assert running[1:3] == ["-m", "sglang.launch_server"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found_and_located(scripted_server: Server, golden_file: Path, name: str) -> None:
    order(scripted_server, name)
    try:
        result = verify(scripted_server, golden_file)
    finally:
        order(scripted_server, "undo")
    assert result.exit_code == 1, result.output
    assert LOCATED[name] in causes(result.output), result.output


def test_without_a_fault_it_passes(scripted_server: Server, golden_file: Path) -> None:
    """The test runs after all the faults, so that it shows each of them to be undone."""
    result = verify(scripted_server, golden_file)
    assert result.exit_code == 0, result.output


def test_compare_asks_it_all_prompts(scripted_server: Server, prompts_file: Path) -> None:
    """A server is compared with itself, for prompts as chats and as raw text, which the server tokenizes."""
    command = [
        "compare",
        scripted_server.url,
        scripted_server.url,
        "--prompts",
        str(prompts_file),
        "--answer-tokens",
        "3",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "4 of 4 prompts become the same tokens" in result.output
    assert "not shown" not in result.output


def test_the_planned_weights_and_kv_cache_are_the_servers(scripted_server: Server, tiny_folder: Path) -> None:
    order(scripted_server, "weigh")
    found = re.search(r"weights: (\d+) bytes, (\d+) tokens of KV cache: (\d+) bytes", scripted_server.log.read_text())
    assert found is not None
    weights, tokens, cache = map(int, found.groups())
    config = K26Config.from_path(tiny_folder)
    planned = sum(per_gpu(config, Layout(absorbed_copy=True), 0).values())
    assert weights == pytest.approx(planned, rel=0.03)
    assert cache == pytest.approx(tokens * kv_bytes_per_token(config.text, "bf16"), rel=0.03)


def test_conformance(scripted_server: Server, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = KimiTokenizer(tiny_folder)

    def script(answer: str) -> dict[str, Any]:
        token_ids = [*tokenizer.encode_prompt(answer), tokenizer.named["<|im_end|>"]]
        return {"custom_logit_processor": Scripted.to_str(), "custom_params": {"script": token_ids}}

    call_to_order(monkeypatch, script)
    holds_to_all(scripted_server.url)


def test_the_doctor_sees_the_plugin(tiny_folder: Path) -> None:
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "sglang")
    assert found["sglang"]["detail"].endswith("the plugin is active")


def test_the_doctor_sees_that_the_plugin_is_off(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLUGINS", "none")
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "sglang", code=1)
    assert "NOT active: SGLANG_PLUGINS is set" in found["sglang"]["detail"]
