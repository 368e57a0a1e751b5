"""Runs small swarms of `k26 swarm` against an engine's real server, and asserts what must hold there."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from click.testing import CliRunner, Result
from support.mixing import ANSWER, mix
from support.server import Server

from k26_plugins.cli import app
from k26_plugins.operate.swarm.memory import server_pid

ANSWERED = {"200", "400", "404", "413", "422"}
SMALL = ("--prefix-tokens", "200", "--answer-tokens", "4", "--tool-latency", "0.05", "--timeout", "120")


def run_swarm(url: str, agents: int, steps: int, *arguments: str) -> Result:
    """Run `k26 swarm` in this process, with short prompts and answers, and return its result."""
    command = ["swarm", "--url", url, "--agents", str(agents), "--steps", str(steps), *SMALL, *arguments]
    return CliRunner().invoke(app, command)


def assert_a_swarm_is_held(
    server: Server,
    folder: Path,
    out: Path,
    *,
    agents: int,
    steps: int,
    adversarial: int,
    known: frozenset[str] = frozenset(),
) -> None:
    """Assert that the server passes a swarm with images, tools, adversarial requests and clients that hang up.

    folder: the checkpoint's. out: the file for the swarm's JSON. adversarial: how many adversarial requests must be
    sent. known: the adversarial requests, as "kind: name", to which the engine itself answers with a server error.
    """
    extra = ["--images", "0.25", "--adversarial", str(adversarial), "--drops", "3"]
    extra += ["--checkpoint", str(folder), "--json", str(out)]
    result = run_swarm(server.url, agents, steps, *extra)
    found: dict[str, Any] = json.loads(out.read_text())
    names = ["answered", "token accounting", "asked again alone", "adversarial requests", "dropped clients"]
    assert [check["name"] for check in found["checks"]] == names
    # The swarm must have compared the prompts' token ids, not only their number.
    assert found["checks"][1]["detail"].endswith(f"{steps} of them compared id by id")
    failed = {check["name"] for check in found["checks"] if not check["passed"]}
    assert failed == ({"adversarial requests"} if known else set()), result.output
    assert result.exit_code == (1 if known else 0)
    assert sum(attack["count"] for attack in found["adversarial"]) == adversarial
    failures = [attack for attack in found["adversarial"] if attack["outcome"] not in ANSWERED]
    harmed = {f"{attack['kind']}: {attack['name']}" for attack in failures}
    assert harmed == known, result.output


def assert_a_mixed_swarm_is_found(server: Server) -> None:
    """Assert that the swarm notices when some answers are another agent's, with the right usage.

    Only the check that asks again alone can show this.
    """
    with mix(server.url, ANSWER) as proxy:
        result = run_swarm(proxy, 4, 14, "--images", "0")
    assert result.exit_code == 1, result.output
    assert "FAIL  asked again alone" in result.output
    assert "FAIL  answered" not in result.output


def assert_a_killed_worker_is_said(server: Server, title: str) -> None:
    """Assert that, when a worker is killed, running requests fail soon and the server no longer says it is healthy.

    title: a text in the command line of the worker's process.
    """
    pid = server_pid(server.url)
    assert pid is not None
    workers = [child for child in psutil.Process(pid).children(recursive=True) if title in " ".join(child.cmdline())]
    assert workers, [child.cmdline() for child in psutil.Process(pid).children(recursive=True)]
    before = server.log.read_text().count("POST /v1/chat/completions")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_swarm, server.url, 8, 400, "--replays", "0")
        # After four requests the swarm has tried the model and split the task, and agents are at work.
        while server.log.read_text().count("POST /v1/chat/completions") < before + 4:
            assert not running.done(), running.result().output
            time.sleep(0.2)
        os.kill(workers[0].pid, signal.SIGKILL)
        began = time.monotonic()
        result = running.result(timeout=200)
    assert time.monotonic() - began < 90
    assert result.exit_code == 1, result.output
    assert "FAIL  answered" in result.output
    with suppress(httpx.TransportError):  # the server may have ended
        assert httpx.get(f"{server.url}/health", timeout=30).status_code != 200


def metric(server: Server, name: str) -> dict[str, float]:
    """Return a metric's samples by their labels, as the endpoint writes them."""
    text = httpx.get(f"{server.url}/metrics", follow_redirects=True, timeout=30).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return {key.removeprefix(name): float(value) for key, value in lines}


def assert_the_metrics_are_there(server: Server, ranks: int, layers: int) -> None:
    """Assert what a server's metrics hold after a swarm with images.

    ranks: how many ranks report. layers: how many MoE layers each has.
    """
    found = metric(server, "k26_experts_layers")
    assert len(found) == ranks
    assert set(found.values()) == {float(layers)}
    assert all('backend="native"' in labels or 'backend="cpu"' in labels for labels in found), found
    errors = metric(server, "k26_experts_self_test_error")
    assert len(errors) == ranks
    # bfloat16's rounding keeps every self-test's error above 0.
    assert all(1e-4 < error < 1e-2 for error in errors.values()), errors
    assert all(seconds > 0 for seconds in metric(server, "k26_experts_self_test_seconds").values())
    decoded = metric(server, "k26_media_decode_seconds_count")
    assert sum(count for labels, count in decoded.items() if 'kind="image"' in labels) >= 4
    assert sum(metric(server, "k26_media_preprocess_seconds_count").values()) >= 4
