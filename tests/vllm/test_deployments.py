"""Other ways to run the server: two ranks, compiled, the prefix cache, another backend, another model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.agreement import BYTES, assert_same_top
from support.checkpoints import make_llama
from support.images import image_part, png, random_image
from support.server import Server
from support.vllm_server import serve

# vLLM's CPU backend wants to know which core is whose where two ranks share a NUMA node.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def one_rank(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tiny_folder, tmp_path_factory.mktemp("one") / "log", "--enforce-eager") as server:
        yield server


def first_tokens(server: Server) -> list[dict[int, float]]:
    """Of several prompts, text and image, the likeliest next tokens and their log-probabilities."""
    found = []
    for index in range(6):
        prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(index)).tolist()
        answer = server.complete(
            prompt, max_tokens=1, temperature=0, logprobs=5, return_tokens_as_token_ids=True, allowed_token_ids=BYTES
        )
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        found.append({int(key.removeprefix("token_id:")): value for key, value in top.items()})
    content = [image_part(png(random_image(100, 80))), {"type": "text", "text": "What?"}]
    entry = server.chat(content, max_tokens=1, temperature=0, logprobs=True, top_logprobs=5)
    top_tokens = entry["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found.append({index: item["logprob"] for index, item in enumerate(top_tokens)})
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tensor-parallel-size", "2"],
        ["--tensor-parallel-size", "2", "--enable-expert-parallel", "--mm-encoder-tp-mode", "data"],
    ],
    ids=["tensor", "expert"],
)
def test_two_ranks_answer_as_one(tiny_folder: Path, tmp_path: Path, one_rank: Server, arguments: list[str]) -> None:
    expected = first_tokens(one_rank)
    with serve(tiny_folder, tmp_path / "log", "--enforce-eager", *arguments, **TWO_RANKS) as server:
        assert_same_top(first_tokens(server), expected)


def test_compiled_answers_as_eager(tiny_folder: Path, tmp_path: Path, one_rank: Server) -> None:
    """torch.compile goes around the experts' operator: nothing in it may break the graph."""
    with serve(tiny_folder, tmp_path / "log") as server:
        assert_same_top(first_tokens(server), first_tokens(one_rank))


def test_the_reference_backend_by_hand(tiny_folder: Path, tmp_path: Path, one_rank: Server) -> None:
    with serve(tiny_folder, tmp_path / "log", "--enforce-eager", K26_EXPERTS="reference") as server:
        assert "run on the core (reference)" in server.log.read_text()
        assert_same_top(first_tokens(server), first_tokens(one_rank))


def test_a_second_request_hits_the_prefix_cache(tiny_folder: Path, tmp_path: Path) -> None:
    """vLLM's CPU MLA has no prefix cache; without MLA the same model has, and the hit's answer is the first one's."""
    arguments = ["--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
    with serve(tiny_folder, tmp_path / "log", *arguments, VLLM_MLA_DISABLE="1") as server:
        prompt = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0)).tolist()
        first, second = (server.complete(prompt, max_tokens=4, temperature=0, ignore_eos=True) for _ in range(2))
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
        assert first["choices"][0]["text"] == second["choices"][0]["text"]


def test_another_architecture_is_served_as_without_the_plugin(tmp_path: Path) -> None:
    """A small Llama with and without the plugin: the same tokens, and no word of ours in the log."""
    folder = tmp_path / "llama"
    make_llama(folder)
    answers = []
    for plugins in ("k26", "none"):
        with serve(
            folder, tmp_path / f"log-{plugins}", "--enforce-eager", "--skip-tokenizer-init", VLLM_PLUGINS=plugins
        ) as server:
            answer = server.complete(
                list(range(50)), max_tokens=8, temperature=0, return_token_ids=True, detokenize=False
            )
            answers.append(answer["choices"][0]["token_ids"])
            assert "k26-plugins" not in server.log.read_text()
    assert len(answers[0]) > 0
    assert answers[0] == answers[1]
