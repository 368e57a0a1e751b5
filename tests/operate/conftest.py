"""What the tests of the operator's commands share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.images import png, random_image
from typer.testing import CliRunner

from k26_plugins.cli import app

PROMPTS = [
    {"id": "hello", "messages": [{"role": "user", "content": "Hello, world! How are you today?"}]},
    {"id": "raw", "text": "The quick brown fox jumps over the lazy dog. " * 3},
    {
        "id": "photo",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "photo.png"}, {"type": "text", "text": "What is it?"}],
            }
        ],
    },
    {"id": "instant", "messages": [{"role": "user", "content": "1 + 1 = ?"}], "thinking": False},
]


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with and without a chat around it, and an image that is padded at the right and the bottom."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "photo.png").write_bytes(png(random_image(100, 60)))
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return file


@pytest.fixture(scope="session")
def golden_file(tiny_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint's golden file."""
    out = tmp_path_factory.mktemp("golden") / "golden.safetensors"
    command = ["golden", str(tiny_folder), "--prompts", str(prompts_file), "--out", str(out), "--answer-tokens", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices this small cost more to share between threads than to multiply."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
