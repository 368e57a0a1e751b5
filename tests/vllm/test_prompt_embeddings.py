"""Tests that a prompt of embeddings is answered as the prompt of the tokens with these embeddings."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agreement import BYTES, assert_same_top
from support.server import Server
from support.vllm_server import serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.kimi_k26 import KimiK26

pytestmark = pytest.mark.long
ASKED = {"max_tokens": 1, "temperature": 0, "allowed_token_ids": BYTES, "return_tokens_as_token_ids": True}
PROMPTS = [torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
TEXTS = [f"{word} is the way to the lake, and {word} do the boats leave?" for word in ("How", "Where", "When", "Which")]


@pytest.fixture(scope="module")
def taking_embeddings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("embeddings") / "log"
    with serve(tiny_folder, log, "--enforce-eager", "--enable-prompt-embeds") as running:
        yield running


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> KimiK26:
    return KimiK26(Checkpoint(tiny_folder))


def encoded(embeddings: torch.Tensor) -> str:
    file = io.BytesIO()
    torch.save(embeddings.clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def test_a_prompt_of_embeddings_is_answered_as_its_tokens(taking_embeddings: Server, reference: KimiK26) -> None:
    def first_token(prompt: list[int] | None, **fields: Any) -> dict[int, float]:
        answer = taking_embeddings.complete(prompt, logprobs=5, **ASKED, **fields)
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(key.removeprefix("token_id:")): value for key, value in top.items()}

    by_token = [first_token(prompt.tolist()) for prompt in PROMPTS]
    by_embedding = [first_token(None, prompt_embeds=encoded(reference.embed(prompt))) for prompt in PROMPTS]
    assert_same_top(by_embedding, by_token)


def test_a_chat_with_embeddings_is_answered_as_its_text(taking_embeddings: Server, reference: KimiK26) -> None:
    """vLLM marks the place of the embeddings in the chat with a token that it adds to the tokenizer."""

    def first_token(*parts: dict[str, str]) -> dict[int, float]:
        content = [{"type": "text", "text": "Say: "}, *parts, {"type": "text", "text": " Well?"}]
        answer = taking_embeddings.chat(content, logprobs=True, top_logprobs=5, **ASKED)
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {int(one["token"].removeprefix("token_id:")): one["logprob"] for one in top}

    by_text = [first_token({"type": "text", "text": text}) for text in TEXTS]
    # The tiny tokenizer's tokens are bytes.
    embedded = [reference.embed(torch.tensor(list(text.encode()))) for text in TEXTS]
    by_embedding = [first_token({"type": "prompt_embeds", "data": encoded(one)}) for one in embedded]
    assert_same_top(by_embedding, by_text)
