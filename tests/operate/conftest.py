"""What the tests of the operator's commands share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.images import png, random_image

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
