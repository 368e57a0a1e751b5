"""Tests of encoder, prefill and decode in servers of their own, each of which goes on from what another computed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.agreement import BYTES, assert_same_top
from support.images import image_part, png, random_image
from support.server import Server, free_port
from support.swarm import metric
from support.vllm_handed_on import NIXL, TO_HAND_ON, encoded, exchange, items, kv, lmcache
from support.vllm_server import serve

pytestmark = pytest.mark.long
# Whole blocks of a KV cache are handed on. The tokens behind them, the same in each prompt, are computed by the server
# that answers.
HANDED_ON, TAIL = 256, [7, 8, 9]
PROMPTS = [
    [*torch.randint(0, 256, (HANDED_ON,), generator=torch.Generator().manual_seed(seed)).tolist(), *TAIL]
    for seed in range(6)
]
IMAGES = [png(random_image(120, 80, seed)) for seed in range(6)]
ASKED = {"max_tokens": 1, "temperature": 0, "allowed_token_ids": BYTES, "return_tokens_as_token_ids": True}


def to_prompts(server: Server) -> list[dict[int, float]]:
    """Return each prompt's likeliest first tokens with their log-probabilities."""
    found = []
    for prompt in PROMPTS:
        top = server.complete(prompt, logprobs=5, **ASKED)["choices"][0]["logprobs"]["top_logprobs"][0]
        found.append({int(key.removeprefix("token_id:")): value for key, value in top.items()})
    return found


def to_images(server: Server) -> list[dict[int, float]]:
    found = []
    for image in IMAGES:
        content: list[dict[str, Any]] = [image_part(image), {"type": "text", "text": "What?"}]
        entry = server.chat(content, logprobs=True, top_logprobs=5, **ASKED)["choices"][0]["logprobs"]["content"][0]
        found.append({int(top["token"].removeprefix("token_id:")): top["logprob"] for top in entry["top_logprobs"]})
    return found


def exchanged(answers: list[Any]) -> list[Any]:
    """Return the answers as they must be once each two neighbours among the items handed on were exchanged."""
    return [answers[index ^ 1] for index in range(len(answers))]


def exchange_each_two(folder: Path) -> None:
    for one, other in zip(items(folder)[::2], items(folder)[1::2], strict=True):
        exchange(one, other)


def test_a_server_answers_with_the_kv_cache_of_another(tiny_folder: Path, tmp_path: Path) -> None:
    """The decode server computes nothing of the cache that it is given: once the caches of each two prompts were
    exchanged, it answers the other prompt."""
    stored = tmp_path / "stored"
    # MLA is off, because vLLM's plain MLA for CPUs begins no prompt in the middle. Prefix caching is off, because a
    # server would not be given again what it keeps itself.
    flags, settings = ("--enforce-eager", "--no-enable-prefix-caching"), {"VLLM_MLA_DISABLE": "1"}
    with serve(tiny_folder, tmp_path / "prefill.log", *flags, *kv(stored, "kv_producer"), **settings) as prefill:
        computed = to_prompts(prefill)
    assert len(items(stored)) == len(PROMPTS)
    with serve(tiny_folder, tmp_path / "decode.log", *flags, *kv(stored, "kv_consumer"), **settings) as decode:
        assert_same_top(to_prompts(decode), computed)
        exchange_each_two(stored)
        assert_same_top(to_prompts(decode), exchanged(computed))
        assert f"Inject KV cache of {HANDED_ON} tokens" in decode.log.read_text()


@pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed")
def test_a_server_answers_with_the_kv_cache_that_nixl_brings(tiny_folder: Path, tmp_path: Path) -> None:
    """With NIXL vLLM's MLA for CPUs too computes only a prompt's last token, and with another prompt's cache the server
    answers that other prompt."""

    def channel() -> dict[str, str]:
        return {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}

    def handed_on(prompt: list[int]) -> dict[str, Any]:
        """Return where the prompt's KV cache is. This serves one request, because the prefill server frees a cache once
        it was read."""
        params: dict[str, Any] = prefill.complete(prompt, kv_transfer_params=TO_HAND_ON, **ASKED)["kv_transfer_params"]
        return params

    def answer(prompt: list[int], **fields: Any) -> dict[int, float]:
        top = decode.complete(prompt, logprobs=5, **ASKED, **fields)["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(key.removeprefix("token_id:")): value for key, value in top.items()}

    with (
        serve(tiny_folder, tmp_path / "prefill.log", "--enforce-eager", *NIXL, **channel()) as prefill,
        serve(tiny_folder, tmp_path / "decode.log", "--enforce-eager", *NIXL, **channel()) as decode,
    ):
        computed = [answer(prompt) for prompt in PROMPTS]
        assert_same_top([answer(one, kv_transfer_params=handed_on(one)) for one in PROMPTS], computed)
        others = [
            answer(one, kv_transfer_params=handed_on(other))
            for one, other in zip(PROMPTS, exchanged(PROMPTS), strict=True)
        ]
        assert_same_top(others, exchanged(computed))
        assert sum(metric(decode, "vllm:nixl_xfer_time_seconds_count").values()) == 2 * len(PROMPTS)


@pytest.mark.skipif(find_spec("lmcache") is None, reason="LMCache is not installed")
def test_a_server_answers_with_the_kv_cache_that_lmcache_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """The second time, the prompts' KV caches come from LMCache, because the server itself keeps none."""
    flags = ("--enforce-eager", "--no-enable-prefix-caching", *lmcache(free_port(), free_port()))
    with serve(tiny_folder, tmp_path / "log", *flags, VLLM_MLA_DISABLE="1") as server:
        computed = to_prompts(server)
        assert sum(metric(server, "vllm:external_prefix_cache_hits_total").values()) == 0
        assert_same_top(to_prompts(server), computed)
        assert sum(metric(server, "vllm:external_prefix_cache_hits_total").values()) == HANDED_ON * len(PROMPTS)


def test_a_server_answers_with_the_embeddings_of_an_encoder(tiny_folder: Path, tmp_path: Path, server: Server) -> None:
    """The answering server encodes no image itself: once the embeddings of each two images were exchanged, it answers
    about the other image."""
    stored = tmp_path / "stored"
    with serve(tiny_folder, tmp_path / "encoder.log", "--enforce-eager", *encoded(stored, "ec_producer")) as encoder:
        for image in IMAGES:
            encoder.chat([image_part(image), {"type": "text", "text": "What?"}], max_tokens=1)
    assert len(items(stored)) == len(IMAGES)
    exchange_each_two(stored)
    computed = to_images(server)
    with serve(tiny_folder, tmp_path / "answers.log", "--enforce-eager", *encoded(stored, "ec_consumer")) as answering:
        found = to_images(answering)
    assert_same_top(found, exchanged(computed))
    with pytest.raises(AssertionError):
        assert_same_top(found, computed)
