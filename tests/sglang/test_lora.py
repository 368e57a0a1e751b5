"""Tests of LoRA in the real server: with each adapter it answers as the reference whose weights the adapter is merged
into in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from support import sglang_unpinned
from support.adapters import LAYER, MODULES, merged
from support.agreement import VOCABULARY, assert_same_distribution, divergence
from support.entry_point import of_sglang
from support.server import Server
from support.sglang_server import EAGER, HAS_ENTRY_POINT, rows, serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.checkpoint.adapter_names import BEGINNINGS
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.adapter import Adapter

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
    settings = {**EAGER, **of_sglang(sglang_unpinned, work / "plugin")}
    with serve(tiny_folder, work / "server.log", *arguments, "--lora-target-modules", *TARGETS, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path) -> dict[str, Adapter]:
    checkpoint = Checkpoint(tiny_folder)
    return {name: Adapter.draw(checkpoint, MODULES, seed) for seed, name in enumerate(BEGINNINGS)}


@pytest.fixture(scope="module")
def folders(server: Server, adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Load all adapters while the server serves, and return their folders by name."""
    work = tmp_path_factory.mktemp("adapters")
    found = {name: adapter.write(work / name, BEGINNINGS[name]) for name, adapter in adapters.items()}
    for name, folder in found.items():
        load(server, name, folder)
    return found


def load(server: Server, name: str, folder: Path) -> None:
    answer = server.post("/load_lora_adapter", lora_name=name, lora_path=str(folder))
    assert answer.status_code == 200, answer.text


def ask(server: Server, name: str | None) -> httpx.Response:
    return server.post(
        "/generate",
        input_ids=PROMPT.tolist(),
        lora_path=name,
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        top_logprobs_num=VOCABULARY,
        logprob_start_len=0,
    )


def served(server: Server, name: str | None) -> torch.Tensor:
    answer = ask(server, name)
    assert answer.status_code == 200, answer.text
    return rows(answer.json()["meta_info"]["input_top_logprobs"][1:])


def all_served(server: Server, names: Iterable[str | None]) -> dict[str | None, torch.Tensor]:
    """Return the answers with each adapter. All are asked for at the same time, so that the server may put them in one
    batch."""
    asked = list(names)
    with ThreadPoolExecutor(len(asked)) as pool:
        return dict(zip(asked, pool.map(lambda name: served(server, name), asked), strict=True))


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, adapters: dict[str, Adapter]) -> dict[str | None, torch.Tensor]:
    """Return the merged models' log-probabilities by the adapter's name; None is the model without an adapter."""
    checkpoint = Checkpoint(tiny_folder)
    base = KimiK26(checkpoint, torch.float32)
    models: dict[str | None, KimiK26] = {None: base} | {
        name: merged(adapter, checkpoint) for name, adapter in adapters.items()
    }
    return {name: model.logprobs(PROMPT)[:-1] for name, model in models.items()}


@pytest.mark.usefixtures("folders")
def test_adapters_answer_as_merged(server: Server, expected: dict[str | None, torch.Tensor]) -> None:
    """All adapters and the model without an adapter are asked at once, and each answers as its merged model."""
    for name, found in all_served(server, expected).items():
        if name is not None:
            assert divergence(expected[None], expected[name]).mean() > 0.05
        assert_same_distribution(found, expected[name])


def test_an_adapter_is_unloaded_and_loaded_again(
    server: Server, folders: dict[str, Path], expected: dict[str | None, torch.Tensor]
) -> None:
    """SGLang loads an unloaded adapter by itself when a request names it, from the folder that it had. Once the folder
    is gone, the request is refused with the adapter's name, and the other adapters answer as before."""
    gone, away = folders["hub"], folders["hub"].with_name("elsewhere")
    assert server.post("/unload_lora_adapter", lora_name="hub").status_code == 200
    gone.rename(away)
    refused = ask(server, "hub")
    assert refused.status_code == 400
    assert "Failed to implicitly load LoRA adapter hub" in refused.text
    never = ask(server, "nobody's")
    assert never.status_code == 400
    assert "Got LoRA adapter that has never been loaded: nobody's" in never.text
    for name, found in all_served(server, expected.keys() - {"hub"}).items():
        assert_same_distribution(found, expected[name])
    load(server, "hub", away)
    for name, found in all_served(server, expected).items():
        assert_same_distribution(found, expected[name])


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
