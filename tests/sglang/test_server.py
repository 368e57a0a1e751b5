"""Tests of the real server on the CPU, through its OpenAI-compatible API, against the core's reference.

Whole distributions come from SGLang's own `/generate`, because its OpenAI API gives only the few likeliest tokens.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from click.testing import CliRunner
from support.agreement import BYTES, VOCABULARY, assert_same_distribution, assert_same_logprobs
from support.expected import image_request, text_prompt
from support.images import BAD_IMAGES, image_part, png_header
from support.server import Server, said
from support.sglang_server import CHUNK, HAS_ENTRY_POINT, generate, rows
from support.sglang_updates import WAYS, from_disk

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.kimi_k26 import KimiK26


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> KimiK26:
    return KimiK26(Checkpoint(tiny_folder), torch.float32)


def test_the_plugin_is_active(server: Server) -> None:
    log = server.log.read_text()
    assert "INT4 experts run on the core" in log
    assert "k26-plugins is not active" not in log


def test_models(server: Server) -> None:
    models = httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"]
    assert [model["id"] for model in models] == [server.model]


def test_prompt_logprobs_of_a_prompt_prefilled_in_pieces(server: Server, reference: KimiK26) -> None:
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))
    answer = generate(server, prompt.tolist(), 1)
    served = rows(answer["meta_info"]["input_top_logprobs"][1:])
    assert_same_distribution(served, reference.logprobs(prompt)[:-1])
    assert f"#new-token: {CHUNK}," in server.log.read_text()


def test_decode_logprobs(server: Server, reference: KimiK26) -> None:
    served, expected = [], []
    for seed in range(8):
        prompt = torch.randint(0, 256, (30,), generator=torch.Generator().manual_seed(seed))
        # The bias keeps media placeholders out of the answer, because the reference takes none for a text token. It
        # also shifts the reported log-probabilities, so that only the tokens without a bias are compared, among
        # themselves.
        bias = {str(token): -100 for token in range(len(BYTES), VOCABULARY)}
        answer = generate(server, prompt.tolist(), 48, logit_bias=bias)
        tokens = torch.tensor(answer["output_ids"])
        assert tokens.max() < len(BYTES)
        served.append(rows(answer["meta_info"]["output_top_logprobs"]))
        expected.append(reference.logprobs(torch.cat((prompt, tokens)))[len(prompt) - 1 : -1])
    among_bytes = [torch.cat(found)[:, BYTES].log_softmax(-1) for found in (served, expected)]
    assert_same_distribution(*among_bytes)


@pytest.mark.skipif(
    not HAS_ENTRY_POINT, reason="SGLang 0.5.10 does not report token ids: adapter/test_tokenizer.py compares them"
)
def test_text_is_rendered_and_tokenized_as_by_the_core(server: Server, tiny_folder: Path) -> None:
    content = "Hello 中文 world, I'm 12345\n"
    answer = server.chat(content, max_tokens=4, return_prompt_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == text_prompt(tiny_folder, content)


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="SGLang 0.5.10 does not report token ids of chats")
def test_verify_passes(server: Server, golden_file: Path) -> None:
    result = CliRunner().invoke(app, ["verify", "--url", server.url, "--golden", str(golden_file)])
    assert result.exit_code == 0, result.output
    assert "SGLang" in result.output
    assert "not shown" not in result.output


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="SGLang 0.5.10 does not report token ids of chats")
def test_updates_of_the_weights_while_serving(
    server: Server, tiny_folder: Path, golden_file: Path, updated: tuple[Path, Path]
) -> None:
    """Each way of updating brings another seed's weights or brings back the first ones; then the answers are those of a
    server that was started with them."""
    places = cycle((updated, (tiny_folder, golden_file)))
    for update, (folder, golden) in zip((*WAYS, from_disk), places, strict=False):
        update(server, folder)
        result = CliRunner().invoke(app, ["verify", "--url", server.url, "--golden", str(golden)])
        assert result.exit_code == 0, result.output


def test_streaming_gives_the_same_text(server: Server) -> None:
    whole = said(server.chat("Hello", max_tokens=16, temperature=0)["choices"][0]["message"])
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "temperature": 0}
    pieces = server.stream("/v1/chat/completions", **body)
    assert whole
    assert "".join(said(piece["choices"][0]["delta"]) for piece in pieces) == whole


@pytest.mark.parametrize("sizes", [[(80, 60)], [(1000, 700)], [(28, 28), (300, 20), (1, 1)]], ids=str)
def test_images(server: Server, tiny_folder: Path, reference: KimiK26, sizes: list[tuple[int, int]]) -> None:
    """The prompt's tokens are the core's, and the answer's logprobs are those of the reference for the core's
    pixels."""
    request = image_request(tiny_folder, sizes)
    more: dict[str, Any] = {"return_prompt_token_ids": True, "return_token_ids": True} if HAS_ENTRY_POINT else {}
    # The bias keeps the media placeholder out of the answer, where the reference does not take it; the placeholder's
    # share of the distribution is small.
    more["logit_bias"] = {"277": -100}
    answer = server.chat(request.content, max_tokens=6, temperature=0, logprobs=True, ignore_eos=True, **more)
    assert answer["usage"]["prompt_tokens"] == len(request.prompt)
    choice = answer["choices"][0]
    served = torch.tensor([entry["logprob"] for entry in choice["logprobs"]["content"]])
    if HAS_ENTRY_POINT:
        assert choice["prompt_token_ids"] == request.prompt
        expected = request.logprobs(reference, choice["response_token_ids"])
    else:
        # SGLang 0.5.10 reports text only, so that only the first token is compared: it is the reference's likeliest.
        expected = request.logprobs(reference, [int(request.likeliest(reference))])
        served = served[:1]
    assert_same_logprobs(served, expected)


def test_sixteen_at_once_answer_as_alone(server: Server) -> None:
    def ask(index: int) -> list[float]:
        prompt = [(index * 7 + step) % 256 for step in range(20 + index)]
        answer = server.complete(prompt, max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
        logprobs: list[float] = answer["choices"][0]["logprobs"]["token_logprobs"]
        return logprobs

    alone = [ask(index) for index in range(4)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(16)))
    for one, other in zip(alone, together, strict=False):
        # The first token's batch is the prompt's own; later tokens may differ where ties in bfloat16 break.
        assert one[0] == pytest.approx(other[0], abs=0.1)
    assert all(len(answer) == 8 for answer in together)


def test_a_second_request_hits_the_radix_cache(server: Server) -> None:
    prompt = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    first, second = (server.complete(prompt, max_tokens=4, temperature=0, ignore_eos=True) for _ in range(2))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


def test_the_same_image_twice_hits_the_radix_cache(server: Server, tiny_folder: Path) -> None:
    """The same image hits the radix cache the second time; another image of the same size in its place does not."""
    one, other = image_request(tiny_folder, [(500, 400)]), image_request(tiny_folder, [(1, 1), (500, 400)])
    question = [other.content[1], other.content[2]]
    first, second, third = (
        server.chat(content, max_tokens=4, temperature=0, ignore_eos=True)
        for content in (one.content, one.content, question)
    )
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(one.prompt) - 20
    said_first, said_second = (said(answer["choices"][0]["message"]) for answer in (first, second))
    assert said_first
    assert said_first == said_second
    details = third["usage"]["prompt_tokens_details"]
    assert (details or {}).get("cached_tokens", 0) < 20


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_answered_and_the_server_lives(server: Server, name: str) -> None:
    content = [image_part(BAD_IMAGES[name]), {"type": "text", "text": "What?"}]
    response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], max_tokens=2)
    # SGLang 0.5.10 answers every error while an image is decoded with 500.
    assert response.status_code == (400 if HAS_ENTRY_POINT else 500), response.text
    assert "image" in response.text.lower()
    assert server.alive()
    assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("size", [(0, 0), (30_000, 30_000)], ids=str)
def test_an_impossible_image_size_is_answered_and_the_server_lives(server: Server, size: tuple[int, int]) -> None:
    messages = [{"role": "user", "content": [image_part(png_header(*size))]}]
    response = server.post("/v1/chat/completions", messages=messages, max_tokens=2)
    # SGLang 0.5.10 answers every error while an image is decoded with 500.
    assert response.status_code == (400 if HAS_ENTRY_POINT else 500), response.text
    assert "image" in response.text.lower()
    assert server.alive()
    assert server.chat("Hello", max_tokens=2)["usage"]["completion_tokens"] > 0
