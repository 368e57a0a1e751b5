"""What all tests share: the tiny checkpoint, golden files, the skipping of GPU tests, and a line of the final
summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.images import png, random_image
from support.instruction_sets import summarize

from k26_plugins.cli import app
from k26_plugins.common.tiny.checkpoint import make_tiny

# Both engines' test files derive their tests from these modules: pytest rewrites the assertions in them, so that a
# failure shows the compared values as in any test file.
pytest.register_assert_rewrite("support.agents", "support.clients", "support.prompt_path")

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
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the default tiny checkpoint. A test that damages files copies the folder first."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of prompts: text with and without a chat around it, and an image that is padded at the right and
    the bottom."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "photo.png").write_bytes(png(random_image(100, 60)))
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return file


@pytest.fixture(scope="session")
def golden_file(tiny_folder: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny checkpoint's golden file."""
    return golden(tiny_folder, prompts_file, tmp_path_factory.mktemp("golden") / "golden.safetensors")


@pytest.fixture(scope="session")
def updated(prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder of a tiny checkpoint with other weights, to update a server with, and its golden file."""
    folder = tmp_path_factory.mktemp("updated") / "tiny"
    make_tiny(folder, seed=1)
    return folder, golden(folder, prompts_file, folder.with_name("golden.safetensors"))


def golden(folder: Path, prompts: Path, out: Path) -> Path:
    command = ["golden", str(folder), "--prompts", str(prompts), "--out", str(out), "--answer-tokens", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, this machine has none"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    summarize(terminalreporter)
