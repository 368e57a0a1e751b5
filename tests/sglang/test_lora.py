"""LoRA in the real server: every adapter answers as the checkpoint into which it is merged in float32."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import sglang_unpinned
from support.adapters import LAYER, MODULES, merged
from support.agreement import VOCABULARY, assert_same_distribution, divergence
from support.server import Server
from support.sglang_server import EAGER, HAS_ENTRY_POINT, rows, serve

from k26_plugins.common.adapter_names import BEGINNINGS
from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.multimodal import KimiK26
from k26_plugins.common.tiny_adapter import Adapter

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not HAS_ENTRY_POINT, reason="the server without pinned memory is a plugin's work"),
]
PROMPT = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(7))
TARGETS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("lora")
    arguments = [
        "--enable-lora",
        "--lora-backend",
        "torch_native",
        "--max-lora-rank",
        "8",
        "--max-loras-per-batch",
        "4",
    ]
    settings = {**EAGER, **sglang_unpinned.settings(work / "plugin")}
    with serve(tiny_folder, work / "server.log", *arguments, "--lora-target-modules", *TARGETS, **settings) as running:
        yield running


def served(server: Server, name: str | None) -> torch.Tensor:
    answer = server.post(
        "/generate",
        input_ids=PROMPT.tolist(),
        lora_path=name,
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        top_logprobs_num=VOCABULARY,
        logprob_start_len=0,
    )
    assert answer.status_code == 200, answer.text
    return rows(answer.json()["meta_info"]["input_top_logprobs"][1:])


def test_adapters_answer_as_merged(server: Server, tiny_folder: Path, tmp_path: Path) -> None:
    """Loaded while serving, all at once beside the model without one, and taken out again."""
    checkpoint = Checkpoint(tiny_folder)
    adapters = {name: Adapter.draw(checkpoint, MODULES, seed) for seed, name in enumerate(BEGINNINGS)}
    for name, adapter in adapters.items():
        folder = adapter.write(tmp_path / name, BEGINNINGS[name])
        answer = server.post("/load_lora_adapter", lora_name=name, lora_path=str(folder))
        assert answer.status_code == 200, answer.text
    names = [*adapters, None]
    with ThreadPoolExecutor(len(names)) as pool:
        found = dict(zip(names, pool.map(lambda name: served(server, name), names), strict=True))
    base = KimiK26(checkpoint, torch.float32).logprobs(PROMPT)[:-1]
    assert_same_distribution(found[None], base)
    for name, adapter in adapters.items():
        expected = merged(adapter, checkpoint).logprobs(PROMPT)[:-1]
        assert divergence(base, expected).mean() > 0.05
        assert_same_distribution(found[name], expected)
    assert server.post("/unload_lora_adapter", lora_name="hub").status_code == 200


REFUSED = {
    "of a routed expert": f"{LAYER.format(1)}.mlp.experts.3.down_proj",
    "of the vision tower": "vision_tower.encoder.blocks.0.mlp.down_proj",
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_that_would_be_dropped_is_refused(server: Server, tmp_path: Path, what: str) -> None:
    drawn = Adapter({REFUSED[what]: (torch.ones(4, 64), torch.ones(64, 4))})
    folder = drawn.write(tmp_path / "adapter", BEGINNINGS["hub"])
    answer = server.post("/load_lora_adapter", lora_name=what, lora_path=str(folder))
    assert answer.status_code == 400
    assert f"the adapter is for {REFUSED[what]} among others" in answer.text
    assert server.alive()
