"""Start the real `vllm serve` on a checkpoint, and talk to it."""

from __future__ import annotations

import base64
import io
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

START_SECONDS = 300
# All of the tiny vocabulary, so that distributions can be compared whole.
MAX_LOGPROBS = 512


@dataclass
class Server:
    url: str
    model: str
    log: Path

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

    def alive(self) -> bool:
        return httpx.get(f"{self.url}/health", timeout=10).status_code == 200


class StartError(RuntimeError):
    """The server ended before it was ready; the message is its log."""


@contextmanager
def serve(folder: Path, log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """Run `vllm serve` until the block ends. Raises StartError with the log where it does not come up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "4096", "--max-logprobs", str(MAX_LOGPROBS), *arguments]
    # 1 GB of KV cache; no look at the hub; the plugin must do with what `pip install` gave it.
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **settings})
    server = Server(f"http://127.0.0.1:{port}", str(folder), log)
    try:
        _wait(process, server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StartError(server.log.read_text())
        try:
            if server.alive():
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise StartError(f"not ready after {START_SECONDS} s:\n{server.log.read_text()[-5000:]}")


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds no pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
