"""Tests of the operator's `k26` commands on the real vLLM: `serve`, `verify` with seeded faults, `compare`,
`doctor`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import documented
from support.conformance import call_to_order, holds_to_all
from support.doctor import doctor
from support.faults import LOCATED, causes
from support.scripted import call
from support.server import Server, python_path
from support.vllm_faults import FAULTS, STOPS_FOR_STOP, order, weights_of
from support.vllm_scripted import script
from support.vllm_server import TWO_RANKS, serve

from k26_plugins.cli import app
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.prompt.output import SECTION_BEGIN, SECTION_END
from k26_plugins.operate.plan.weights import Layout, per_gpu
from k26_plugins.operate.verify.endpoint import Endpoint


@pytest.fixture(scope="module")
def two_ranks(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server on two ranks. It runs on the reference backend, whose weights lie as in the checkpoint, so that a
    fault can be put into them."""
    arguments = ["--enforce-eager", "--tensor-parallel-size", "2"]
    arguments += ["--worker-extension-cls", "support.vllm_faults.Workers"]
    arguments += ["--middleware", "support.vllm_faults.Frontend"]
    arguments += ["--logits-processors", "support.vllm_scripted:Scripted"]
    environment = {"K26_EXPERTS": "reference", "PYTHONPATH": python_path(), **TWO_RANKS}
    command = [*documented.as_run(documented.SERVE_VLLM, tiny_folder), "--"]
    log = tmp_path_factory.mktemp("two") / "server.log"
    with serve(tiny_folder, log, *arguments, command=command, **environment) as server:
        yield server


def verify(server: Server, golden_file: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["verify", "--url", server.url, "--golden", str(golden_file), *options])


def test_every_fault_is_located() -> None:
    assert set(FAULTS) == set(LOCATED)


def test_k26_serve_has_become_the_engine(two_ranks: Server) -> None:
    """`k26 serve` becomes the engine's process, so that signals and the exit status are the engine's."""
    running = Path(f"/proc/{two_ranks.pid}/cmdline").read_text().split("\0")
    assert [Path(word).name for word in running[1:3]] == ["vllm", "serve"]
    log = two_ranks.log.read_text()
    assert f"vllm serve {two_ranks.model} --max-model-len 4096" in log
    assert "run on the core (reference)" in log


def test_k26_serve_ends_as_the_engine_does(tiny_folder: Path) -> None:
    command = [*documented.as_run(documented.SERVE_VLLM, tiny_folder), "--", "--no-such-flag"]
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 2
    assert "unrecognized arguments: --no-such-flag" in done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found_and_located(two_ranks: Server, golden_file: Path, name: str) -> None:
    order(two_ranks.url, name)
    try:
        result = verify(two_ranks, golden_file)
    finally:
        order(two_ranks.url, None)
    assert result.exit_code == 1, result.output
    assert LOCATED[name] in causes(result.output), result.output


def test_without_a_fault_it_passes(two_ranks: Server, golden_file: Path) -> None:
    """The test runs after all the faults, so that it shows each of them to be undone."""
    result = verify(two_ranks, golden_file)
    assert result.exit_code == 0, result.output


def test_compare_asks_it_all_prompts(two_ranks: Server, prompts_file: Path) -> None:
    """A server is compared with itself, for prompts as chats and as raw text, which the server tokenizes."""
    command = ["compare", two_ranks.url, two_ranks.url, "--prompts", str(prompts_file), "--answer-tokens", "3"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "4 of 4 prompts become the same tokens" in result.output
    assert "not shown" not in result.output


def test_the_planned_weights_are_the_ranks(two_ranks: Server, tiny_folder: Path) -> None:
    """The planned weights of a rank are those that vLLM holds. Without --mm-encoder-tp-mode data vLLM cuts the vision
    tower too."""
    layout = Layout(tp=2, vision_whole=False)
    planned = sum(per_gpu(K26Config.from_path(tiny_folder), layout, 0).values())
    assert weights_of(two_ranks.url) == pytest.approx([planned, planned], rel=0.03)


CALLS = {
    "right": (None, '{"city":"Bern"}', ""),
    "no JSON": (None, '{"city":', "arguments of get_weather are no JSON"),
    "against the schema": (None, '{"town":"Bern"}', "break their schema: 'city' is a required property"),
    "another stop": (STOPS_FOR_STOP, '{"city":"Bern"}', "stops for 'stop', expected 'tool_calls'"),
}


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls(
    two_ranks: Server, tiny_folder: Path, golden_file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Random weights call no tool, so the test orders the tokens of the answer; all else is the server's own."""
    fault, arguments, found = CALLS[name]
    answer = f"why</think>{SECTION_BEGIN}{call('functions.get_weather:0', arguments)}{SECTION_END}"
    said = script(tiny_folder, answer)

    def by_script(chat: Callable[..., Any]) -> Callable[..., Any]:
        return lambda endpoint, messages, **body: chat(endpoint, messages, **body, **(said if "tools" in body else {}))

    for method in ("chat", "streamed_chat"):
        monkeypatch.setattr(Endpoint, method, by_script(getattr(Endpoint, method)))
    if fault:
        order(two_ranks.url, fault)
    try:
        result = verify(two_ranks, golden_file, "--tools")
    finally:
        if fault:
            order(two_ranks.url, None)
    assert result.exit_code == (1 if found else 0), result.output
    assert found in result.output
    # vLLM answers a `required` call that is no JSON with an error, which is a fault too.
    assert f"{7 if name == 'no JSON' else 8} calls in 8 answers" in result.output


def test_conformance(two_ranks: Server, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call_to_order(monkeypatch, lambda answer: script(tiny_folder, answer))
    holds_to_all(two_ranks.url)


def test_the_doctor_sees_the_plugin(tiny_folder: Path) -> None:
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "vllm")
    assert found["vllm"]["detail"].endswith("the plugin is active")


def test_the_doctor_sees_that_the_plugin_is_off(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "vllm", code=1)
    assert "NOT active: VLLM_PLUGINS is set" in found["vllm"]["detail"]
