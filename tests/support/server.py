"""Start an engine's real server on a checkpoint, and talk to it."""

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
    url: str
    model: str
    log: Path
    pid: int
    """The process that was started."""

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json={"model": self.model, **body}, timeout=120)

    def chat(self, content: Any, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def complete(self, prompt: Any, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", prompt=prompt, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The pieces of a streamed answer, in order; the `[DONE]` at its end is none."""
        request = {"model": self.model, "stream": True, **body}
        with httpx.stream("POST", f"{self.url}{path}", json=request, timeout=120) as response:
            assert response.status_code == 200, response.read()
            return [json.loads(event.data) for event in EventSource(response).iter_sse() if event.data != "[DONE]"]

    def alive(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=20).status_code == 200


def said(message: dict[str, Any]) -> str:
    """All text of a message, or of a streamed piece of one: what the model thought, then what it answered."""
    return (message.get("reasoning") or message.get("reasoning_content") or "") + (message.get("content") or "")


def python_path() -> str:
    """PYTHONPATH of a server that imports `support`; the package itself it may have from there too."""
    return os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


class StartError(RuntimeError):
    """The server ended or stood still before it was ready; the message is the end of its log, which is short enough to be
    shown whole."""

    def __init__(self, log: str, why: str = "") -> None:
        super().__init__(f"{why}{log[-6000:]}")
        self.log = log


@contextmanager
def start_fails(pattern: str) -> Iterator[None]:
    """The start within the block ends with `pattern` in its log; where it does not, the end of the log is what is shown."""
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
    # What it started and left behind would hold the memory of the tests that follow.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def run_server(
    command: Sequence[str], folder: Path, log: Path, environment: dict[str, str], ready: str | None = None
) -> Iterator[Server]:
    """Run `command` with a host and a free port added until the block ends.

    ready: a line of the log to wait for, where the server answers before it is. Raises StartError with the log where it
    does not come up.
    """
    port = free_port()
    # No look at the hub: the plugin must do with what `pip install` gave it.
    # The environment's programs first, as where it is activated.
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
        # No test waits for a running request to end.
        end(process, seconds=3)


def wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises StartError with the process' log where it ends before, or stands still."""
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
