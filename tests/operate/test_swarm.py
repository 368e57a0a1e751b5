"""Tests of the swarm's traffic and of its verdict: a right server passes, and each way of losing a conversation is
found."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from click.testing import CliRunner
from support.endpoint import serve_reference
from support.mixing import ANSWER, HISTORY, mix

from k26_plugins.cli import app
from k26_plugins.operate.swarm import tools
from k26_plugins.operate.swarm.adversarial import adversarial_requests
from k26_plugins.operate.swarm.client import Step
from k26_plugins.operate.swarm.integrity import compare_alone
from k26_plugins.operate.swarm.memory import growth, resident_bytes
from k26_plugins.operate.swarm.metrics import PrefixCache, hit_rate, read_prefix_cache
from k26_plugins.operate.swarm.pace import Pace
from k26_plugins.operate.swarm.scenario import Shape, ShapeError, make_agents, shared_prefix
from k26_plugins.operate.verify.connect import connect

SMALL = ["--agents", "4", "--steps", "26", "--prefix-tokens", "40", "--answer-tokens", "2", "--tool-latency", "0.01"]
SMALL += ["--images", "0.5"]


@pytest.fixture(scope="module")
def url(tiny_folder: Path) -> Iterator[str]:
    """Yield the address of a server that reports the prompt's token ids and gives every conversation an answer of its
    own."""

    def answer(messages: list[dict[str, Any]]) -> str:
        return f"{zlib.crc32(json.dumps(messages).encode()):08x}"

    with serve_reference(tiny_folder, speak=answer) as address:
        yield address


def swarm(url: str, *arguments: str, out: Path | None = None) -> tuple[int, str, dict[str, Any]]:
    """Run a small swarm, and return its exit code, its output and its JSON."""
    files = [] if out is None else ["--json", str(out / "run.json"), "--html", str(out / "run.html")]
    result = CliRunner().invoke(app, ["swarm", "--url", url, *SMALL, *arguments, *files])
    return result.exit_code, result.output, json.loads((out / "run.json").read_text()) if out is not None else {}


def test_a_right_server_passes(url: str, tiny_folder: Path, tmp_path: Path) -> None:
    code, output, found = swarm(url, "--checkpoint", str(tiny_folder), "--deterministic", out=tmp_path)
    assert code == 0, output
    assert [check["name"] for check in found["checks"]] == [
        "answered", "token accounting", "asked again alone", "deterministic",
    ]  # fmt: skip
    steps = [dict(zip(found["step_fields"], step, strict=True)) for step in found["steps"]]
    assert [step["kind"] for step in steps].count("agent") == 24
    assert [step["kind"] for step in steps if step["agent"] == -1] == ["split", "merge"]
    assert found["figures"]["completion_tokens"] == sum(step["completion_tokens"] for step in steps) > 0
    page = (tmp_path / "run.html").read_text()
    assert page.count("<svg") >= 3
    assert "holds a swarm of 4 agents" in page


@pytest.mark.parametrize(("what", "check"), [(HISTORY, "token accounting"), (ANSWER, "asked again alone")])
def test_mixed_conversations_are_found(url: str, tiny_folder: Path, tmp_path: Path, what: str, check: str) -> None:
    """Mixed histories are found by the prompts' token ids. Mixed answers are found by asking again alone, because usage
    and ids are right."""
    with mix(url, what) as proxy:
        code, output, found = swarm(proxy, "--checkpoint", str(tiny_folder), out=tmp_path)
    assert code == 1, output
    failed = [entry["name"] for entry in found["checks"] if not entry["passed"]]
    assert failed[0] == check, output
    assert found["faults"][0]["what"].startswith("mixed")


def answered(agent: int, noise: int, places: int = 4, far: int | None = None) -> Step:
    """Return an answer of an agent's own, which is rounded otherwise for each `noise`; at the token `far` another
    expert was chosen."""
    own, rounding = torch.Generator().manual_seed(agent), torch.Generator().manual_seed(1000 + noise)
    fingerprint = []
    for place in range(places):
        logits = 0.1 * torch.randn(20, generator=own) + 1e-3 * torch.randn(20, generator=rounding)
        if place == far:
            logits += 0.3 * torch.randn(20, generator=rounding)
        listed = {bytes([token]): value for token, value in enumerate(logits.log_softmax(-1).tolist())}
        fingerprint.append((b"\0", listed))
    return Step(agent, 0, "agent", fingerprint=fingerprint)


@pytest.mark.parametrize("far", range(4))
def test_one_place_that_is_far_off_is_no_other_conversation(far: int) -> None:
    """A token that is far off was seen in 8 of 400 answers of vLLM: if two experts are all but level, the batch decides
    which one is chosen."""
    alone = [answered(agent, noise=0) for agent in range(20)]
    live = [answered(agent, noise=agent, far=far if agent == 7 else None) for agent in range(1, 20)]
    assert not compare_alone([answered(0, noise=30), *live], alone).faults()
    another = dataclasses.replace(answered(12, noise=30), agent=0)
    assert [fault.agent for fault in compare_alone([another, *live], alone).faults()] == [0]


def repeats_its_code_word(messages: list[dict[str, Any]]) -> str:
    """Answer with the code word of the swarm's messages, as a real model does."""
    found = re.search(r"code word is ([\w-]+)", " ".join(text for message in messages for text in _texts(message)))
    return found[1] if found else "merged"


def _texts(message: dict[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def test_secrets_come_back_and_a_mixed_one_is_found(tiny_folder: Path, tmp_path: Path) -> None:
    with serve_reference(tiny_folder, vendor=True, speak=repeats_its_code_word) as url:
        code, output, found = swarm(url, "--replays", "0", out=tmp_path)
        assert code == 0, output
        assert {"name": "secrets", "passed": True, "detail": "4 agents know theirs"} in found["checks"]
        with mix(url, ANSWER) as proxy:
            code, output, found = swarm(proxy, "--replays", "0", out=tmp_path)
    assert code == 1, output
    assert "says the code word of agent" in output


def test_a_forgotten_secret_is_lost(tiny_folder: Path) -> None:
    with serve_reference(tiny_folder, vendor=True, speak=lambda messages: "what?") as url:
        code, output, _ = swarm(url, "--replays", "0", "--secrets")
    assert code == 1, output
    assert "lost: it does not know its code word" in output


@pytest.mark.parametrize("command", ["swarm", "verify", "compare"])
def test_a_page_without_matplotlib_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setattr("k26_plugins.cli.reports.find_spec", lambda name: None)
    nowhere = "http://localhost:1"
    arguments = {
        "swarm": ["--url", nowhere],
        "verify": ["--url", nowhere, "--golden", "none"],
        "compare": [nowhere, nowhere, "--prompts", "none"],
    }[command]
    result = CliRunner().invoke(app, [command, *arguments, "--html", "page.html"])
    assert result.exit_code == 2
    assert "pip install 'k26-plugins[report]'" in result.output


def test_the_same_seed_sends_the_same(tmp_path: Path) -> None:
    shape = Shape(agents=20, steps=100, prefix_tokens=50, seed=3)
    assert make_agents(shape) == make_agents(shape)
    assert shared_prefix(shape, len) == shared_prefix(shape, len)
    assert make_agents(shape) != make_agents(Shape(agents=20, steps=100, prefix_tokens=50, seed=4))
    one, same = ([request.content for request in adversarial_requests(120, "m", 3)] for _ in range(2))
    assert one == same


def test_the_shape_adds_up() -> None:
    shape = Shape()
    agents = make_agents(shape)
    assert sum(agent.turns for agent in agents) + 1 + sum(shape.merges()) == 4000
    assert shape.merges() == [15, 1]
    assert len({agent.secret for agent in agents}) == 300
    assert sum(agent.image is not None for agent in agents) == 30
    with pytest.raises(ShapeError, match="who need 12"):
        make_agents(Shape(agents=10, steps=11))


def test_tools_take_what_the_script_sends() -> None:
    for name, schema in tools.SCHEMAS.items():
        arguments = tools.scripted_arguments(name, random.Random(0))
        jsonschema.Draft202012Validator.check_schema(schema)
        assert tools.fault_of(name, json.dumps(arguments)) is None
        assert tools.answer(name, json.dumps(arguments)) == tools.answer(name, json.dumps(arguments))
    assert "no tool" in str(tools.fault_of("gone", "{}"))
    assert tools.fault_of("search", '{"query": 1}') is not None
    assert tools.fault_of("search", "{") is not None


def test_the_open_loop_sends_at_its_rate() -> None:
    async def arrivals() -> float:
        pace = Pace(1, 200.0, seed=0)

        async def one() -> None:
            async with pace.turn():
                await asyncio.sleep(0.5)  # an answer that is slower than the arrivals

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(100)))
        return time.perf_counter() - began

    # 100 arrivals at 200/s, then the last answer: in a closed loop it would take 50 s.
    assert 0.7 < asyncio.run(arrivals()) < 3


def test_memory_that_grows_is_seen() -> None:
    assert growth([(second, 100) for second in range(400)]) == pytest.approx(0)
    assert growth([(second, 400 + second) for second in range(400)]) == pytest.approx(0.36, abs=0.02)
    assert growth([(second, 100 + second) for second in range(100)]) is None
    assert resident_bytes(2**22 + 1) == 0


def test_a_line_separator_in_an_answer_ends_no_event(tiny_folder: Path, tmp_path: Path) -> None:
    """Python splits lines at some characters at which a stream of events does not end."""
    said = "one\u2028two\u2029three\x85four"
    with serve_reference(tiny_folder, speak=lambda messages: said) as address:
        code, output, found = swarm(address, out=tmp_path)
        assert connect(address).streamed_chat([{"role": "user", "content": "?"}])["message"]["content"] == said
    assert code == 0, output
    assert {dict(zip(found["step_fields"], step, strict=True))["outcome"] for step in found["steps"]} == {"ok"}


METRICS = """# HELP vllm:prefix_cache_queries_total Tokens asked for.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="a } b"} 100.0
vllm:prefix_cache_queries_total{engine="1",model_name="a } b"} 20.0
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="a } b"} 1.5e+01
# TYPE vllm:prefix_cache_hits_created gauge
vllm:prefix_cache_hits_created{engine="0",model_name="a } b"} 1.7e+09
"""


@pytest.mark.parametrize(
    ("status", "text", "found"),
    [(200, METRICS, PrefixCache(120, 15)), (200, "a b c d", None), (200, "", None), (404, METRICS, None)],
)
def test_the_engines_counters_are_summed_over_its_ranks(status: int, text: str, found: PrefixCache | None) -> None:
    async def read() -> PrefixCache | None:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
        async with httpx.AsyncClient(transport=transport) as http:
            return await read_prefix_cache(http, "http://server")

    assert asyncio.run(read()) == found


def test_the_hit_rate_is_of_the_run_alone() -> None:
    assert hit_rate(PrefixCache(1000, 1000), PrefixCache(3000, 1500)) == 0.25
    assert hit_rate(None, PrefixCache(1, 1)) is None
