"""Starts an engine's real server on a checkpoint, and talks to it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import EventSource
from support.progress import Progress, StandsStillError


@dataclass
class Server:
    """A running server."""

    url: str
    model: str
    """The model's name in requests: the checkpoint's folder."""
    log: Path
    pid: int
    """The process that was started."""

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json={"model": self.model, **body}, timeout=120)

    def chat(self, content: Any, **body: Any) -> dict[str, Any]:
        """Return the answer to a chat with one user message. body: further fields of the request."""
        response = self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        """Return the answer to a raw completion. prompt: a text or token ids. body: further fields of the request."""
        response = self.post("/v1/completions", prompt=prompt, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Return the chunks of a streamed answer, in order, without the `[DONE]` at its end."""
        request = {"model": self.model, "stream": True, **body}
        with httpx.stream("POST", f"{self.url}{path}", json=request, timeout=120) as response:
            assert response.status_code == 200, response.read()
            return [json.loads(event.data) for event in EventSource(response).iter_sse() if event.data != "[DONE]"]

    def alive(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=20).status_code == 200


def said(message: dict[str, Any]) -> str:
    """Return all text of a message, or of a streamed chunk's delta: the reasoning content, then the content."""
    return (message.get("reasoning") or message.get("reasoning_content") or "") + (message.get("content") or "")


def python_path() -> str:
    """Return the PYTHONPATH of a process that imports `support`: the tests' folder, then what this process has set.

    The present value stays because the package itself may be found by it.
    """
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


class StartError(RuntimeError):
    """The server ended or stood still before it was ready. The message has the end of its log, short enough to be
    shown; `log` holds all of it."""

    def __init__(self, log: str, why: str = "") -> None:
        super().__init__(f"{why}{log[-6000:]}")
        self.log = log


@contextmanager
def start_fails(pattern: str) -> Iterator[None]:
    """Assert that the server's start within the block fails and that its log matches the regular expression `pattern`.

    If the log does not match, the test fails and shows the end of the log.
    """
    try:
        yield
    except StartError as error:
        if not re.search(pattern, log := error.log):
            last = "\n".join(line[:300] for line in log.splitlines()[-30:])
            pytest.fail(f"the server ended, and its log does not say {pattern!r}. Its end:\n{last}", pytrace=False)
    else:
        pytest.fail("the server came up", pytrace=False)


def free_port() -> int:
    """Return a port of this machine that nothing listens on.

    The port lies below those that the system gives to connections: the server binds it, and the ports that engines count
    from it, seconds after this look, and by then another test's connection could have taken one of those. It also lies below
    22000 to 29999, since SGLang's server takes a port of that range for itself before it binds this one.
    """
    while True:
        port = random.randrange(12_000, 22_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a process that leads a session to end, then kill whatever is left of the session after `seconds`."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    # A process that the server started and left behind would occupy memory that later tests need.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def run_server(
    command: Sequence[str], folder: Path, log: Path, environment: dict[str, str], ready: str | None = None
) -> Iterator[Server]:
    """Run `command`, with a host and a free port added, until the block ends, and yield the server when it is ready.

    folder: the checkpoint's. environment: variables to add. ready: a text in the log to wait for, for a server that
    answers before it is ready. Raises StartError with the log if the server does not come up.
    """
    port = free_port()
    # The hub is switched off, because the plugin must need nothing but what `pip install` brought. The environment's
    # programs come first on PATH, as in an activated environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", **environment}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,  # KTransformers' command line would ask at a terminal
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=settings,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", str(folder), log, process.pid)
    try:
        wait_until(lambda: (ready is None or ready in log.read_text()) and server.alive(), process, log)
        yield server
    finally:
        # The wait is short because no test needs a running request to end.
        end(process, seconds=3)


def wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until `is_ready` returns True. Raises StartError with the log if the process ends or stands still before."""
    progress = Progress(process.pid, log)
    while process.poll() is None:
        try:
            if is_ready():
                return
        except httpx.TransportError:
            pass
        try:
            progress.check()
        except StandsStillError as error:
            raise StartError(log.read_text(), f"{error}:\n") from error
        time.sleep(0.5)
    raise StartError(log.read_text())
