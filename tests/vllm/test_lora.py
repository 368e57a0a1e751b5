"""Tests of LoRA in the real server: with each adapter it answers as the reference whose weights the adapter is merged
into in float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from support import documented
from support.adapters import KV_B, LAYER, MODULES, merged
from support.agreement import VOCABULARY, assert_same_distribution, divergence, rows
from support.server import Server
from support.vllm_server import serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.checkpoint.adapter_names import BEGINNINGS
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.adapter import Adapter

PROMPT = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return Checkpoint(tiny_folder)


@pytest.fixture(scope="module")
def adapters(checkpoint: Checkpoint) -> dict[str, Adapter]:
    return {name: Adapter.draw(checkpoint, MODULES, seed) for seed, name in enumerate(BEGINNINGS)}


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("lora") / "server.log"
    command = documented.as_run(documented.LORA_VLLM, tiny_folder)
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with serve(tiny_folder, log, "--enforce-eager", "--max-cpu-loras", "4", command=command, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(
    server: Server, adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Adapter]:
    work = tmp_path_factory.mktemp("adapters")
    for name, adapter in adapters.items():
        folder = adapter.write(work / name, BEGINNINGS[name])
        answer = server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folder))
        assert answer.status_code == 200, answer.text
    return adapters


def served(server: Server, name: str) -> torch.Tensor:
    asked = replace(server, model=name)
    answer = asked.complete(PROMPT.tolist(), max_tokens=1, prompt_logprobs=VOCABULARY)
    return rows(answer["choices"][0]["prompt_logprobs"][1:])


def test_adapters_answer_as_merged(server: Server, loaded: dict[str, Adapter], checkpoint: Checkpoint) -> None:
    """All adapters and the model without an adapter are asked at once, which is more than the engine holds at a time,
    and each answers as its merged model."""
    names = [*loaded, server.model]
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(lambda name: served(server, name), names), strict=True))
    base = KimiK26(checkpoint, torch.float32).logprobs(PROMPT)[:-1]
    assert_same_distribution(found[server.model], base)
    for name, adapter in loaded.items():
        expected = merged(adapter, checkpoint).logprobs(PROMPT)[:-1]
        # The limit is a hundred times what separates the server from its reference.
        assert divergence(base, expected).mean() > 0.1
        assert_same_distribution(found[name], expected)


REFUSED = {
    "of a matrix that MLA takes apart": (KV_B,),
    "of a routed expert": (*MODULES[:2], f"{LAYER.format(1)}.mlp.experts.3.down_proj"),
    "of the router": (f"{LAYER.format(1)}.mlp.gate",),
    "of the vision tower": ("vision_tower.encoder.blocks.0.wqkv",),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_that_would_be_dropped_is_refused(
    server: Server, loaded: dict[str, Adapter], tmp_path: Path, what: str
) -> None:
    """The refusal names the adapter's module, and the server goes on with the adapters that it has."""
    shape = (4, 64)
    drawn = {module: (torch.ones(shape), torch.ones(shape[::-1])) for module in REFUSED[what]}
    folder = Adapter(drawn).write(tmp_path / "adapter", BEGINNINGS["hub"])
    answer = server.post("/v1/load_lora_adapter", lora_name="refused", lora_path=str(folder))
    assert answer.status_code >= 400
    assert REFUSED[what][-1] in answer.text
    assert "refused" not in {model["id"] for model in httpx.get(f"{server.url}/v1/models", timeout=10).json()["data"]}
    assert replace(server, model="text").complete("a", max_tokens=1)["choices"]


def test_an_adapter_is_taken_out(server: Server, loaded: dict[str, Adapter]) -> None:
    assert server.post("/v1/unload_lora_adapter", lora_name="hub").status_code == 200
    answer = replace(server, model="hub").post("/v1/completions", prompt=PROMPT.tolist(), max_tokens=1)
    assert answer.status_code == 404, answer.text
