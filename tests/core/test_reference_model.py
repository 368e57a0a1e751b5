"""Tests of the reference model in float32. The judge is transformers' own `kimi_k25` on the same weights, which holds
nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file
from support.agreement import BF16_NOISE
from transformers import AutoModelForImageTextToText
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.model.config import TextConfig
from k26_plugins.common.model.rope import yarn_inv_freq
from k26_plugins.common.model.router import route
from k26_plugins.common.reference.decoder import KVCache, rms_norm
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.reference.moonvit import MoonViT

TOLERANCE = 1e-5
TRANSFORMERS_LOW_RANK_EPS = 1e-6


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def judge(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return transformers' model of a float32 copy of the checkpoint whose experts compressed-tensors unpacked."""
    weights: dict[str, torch.Tensor] = {}
    for file in tiny_folder.glob("*.safetensors"):
        weights.update(load_file(file))
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        owner, _, part = name.rpartition(".")
        if part == "weight_packed":
            q = unpack_from_int32(tensor, 4, torch.Size(weights[f"{owner}.weight_shape"].tolist()))
            dense[f"{owner}.weight"] = q.float() * weights[f"{owner}.weight_scale"].float().repeat_interleave(32, 1)
        elif part not in ("weight_scale", "weight_shape"):
            dense[name] = tensor.float()
    folder = tmp_path_factory.mktemp("dense")
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_folder / "config.json").read_text())
    del config["auto_map"], config["text_config"]["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> KimiK26:
    return KimiK26(Checkpoint(tiny_folder), torch.float32, TRANSFORMERS_LOW_RANK_EPS)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_text_logits(judge: Any, reference: KimiK26) -> None:
    input_ids = tokens(100)
    expected = judge(input_ids=input_ids[None]).logits[0].log_softmax(-1)
    assert error(reference.logprobs(input_ids), expected) <= TOLERANCE


@torch.inference_mode()
def test_decoding_through_the_compressed_cache(judge: Any, reference: KimiK26) -> None:
    """Prefill in the plain form, then one token at a time in the absorbed form, give what the judge's one whole pass
    gives."""
    input_ids = tokens(40)
    expected = judge(input_ids=input_ids[None]).logits[0]
    text = reference.text
    cache = KVCache(text.config, 40, torch.float32)
    parts = [text.forward(text.embed(input_ids[:25]), cache)]
    parts += [text.forward(text.embed(input_ids[index : index + 1]), cache) for index in range(25, 40)]
    assert error(text.logits(torch.cat(parts)), expected) <= TOLERANCE


@torch.inference_mode()
def test_plain_absorbed_and_chunked_agree(reference: KimiK26) -> None:
    text, input_ids = reference.text, tokens(60)
    runs = []
    for chunks, absorbed in (([60], False), ([60], True), ([7, 30, 23], True), ([7, 30, 23], False)):
        cache = KVCache(text.config, 60, torch.float32)
        parts = [text.forward(text.embed(part), cache, absorbed=absorbed) for part in input_ids.split(chunks)]
        runs.append(torch.cat(parts))
    for run in runs[1:]:
        assert error(run, runs[0]) <= TOLERANCE
    with pytest.raises(ValueError, match="do not fit"):
        text.forward(text.embed(input_ids[:1]), cache)


@torch.inference_mode()
def test_pipeline_ranks_chained_give_the_whole(reference: KimiK26) -> None:
    """Each of two ranks has a part of the layers; the second is given the first one's hidden states."""
    text, input_ids = reference.text, tokens(30)
    cache = KVCache(text.config, 30, torch.float32)
    hidden_states = text.embed(input_ids)
    for rank in (text.layers[:2], text.layers[2:]):
        for block in rank:
            hidden_states = block.forward(hidden_states, cache, absorbed=False)
    whole = text.forward(text.embed(input_ids), KVCache(text.config, 30, torch.float32))
    assert torch.equal(rms_norm(hidden_states, text.norm, text.config.rms_norm_eps), whole)


GRIDS = [[(1, 2, 2)], [(1, 64, 64)], [(1, 6, 10), (1, 36, 4), (1, 2, 2)]]


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@torch.inference_mode()
def test_images(judge: Any, reference: KimiK26, grids: list[tuple[int, int, int]]) -> None:
    """The whole model agrees with the judge on prompts of one or more images, each followed by text."""
    grid_thw = torch.tensor(grids)
    pixel_values = torch.randn(int(grid_thw.prod(1).sum()), 3, 14, 14, generator=torch.Generator().manual_seed(1))
    placeholder = reference.config.media_placeholder_token_id
    parts = [part for _, h, w in grids for part in (torch.full((h * w // 4,), placeholder), tokens(3))]
    input_ids = torch.cat(parts)
    expected = judge(input_ids=input_ids[None], pixel_values=pixel_values, image_grid_thw=grid_thw).logits[0]
    result = reference.logprobs(input_ids, pixel_values, grid_thw)
    assert error(result, expected.log_softmax(-1)) <= TOLERANCE


@pytest.mark.parametrize("frames", [2, 3, 4])
@torch.inference_mode()
def test_video_chunks(judge: Any, reference: KimiK26, frames: int) -> None:
    # transformers' temporal pooling takes media of one length only, hence two chunks of as many frames.
    grid_thw = torch.tensor([[frames, 6, 8], [frames, 4, 4]])
    pixel_values = torch.randn(int(grid_thw.prod(1).sum()), 3, 14, 14, generator=torch.Generator().manual_seed(1))
    merged = judge.model.vision_tower(pixel_values, grid_thw=grid_thw).pooler_output
    expected = judge.model.mm_projector(merged).squeeze(1)
    assert error(torch.cat(reference.vision(pixel_values, grid_thw)), expected) <= TOLERANCE


@torch.inference_mode()
def test_media_do_not_see_each_other(reference: KimiK26) -> None:
    grids = torch.tensor([[1, 4, 6], [3, 2, 4]])
    pixel_values = torch.randn(48, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    together = reference.vision(pixel_values, grids)
    alone = [reference.vision(pixel_values[:24], grids[:1])[0], reference.vision(pixel_values[24:], grids[1:])[0]]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_bfloat16_stays_near_float32(tiny_folder: Path, reference: KimiK26) -> None:
    rounded = KimiK26(Checkpoint(tiny_folder))
    pixel_values = torch.randn(4 * 24, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    grids = torch.tensor([[4, 4, 6]])
    result = torch.cat(rounded.vision(pixel_values, grids))
    assert result.dtype == torch.bfloat16
    assert error(result.float(), torch.cat(reference.vision(pixel_values, grids))) < 0.03


def test_more_frames_than_a_chunk_has(reference: KimiK26) -> None:
    with pytest.raises(ValueError, match="5 frames"):
        reference.vision(torch.zeros(20, 3, 14, 14), torch.tensor([[5, 2, 2]]))


def test_media_and_placeholders_must_match(reference: KimiK26) -> None:
    placeholder = reference.config.media_placeholder_token_id
    with pytest.raises(ValueError, match="0 tokens and the prompt has 1"):
        reference.logprobs(torch.tensor([1, placeholder]))


def test_generation(reference: KimiK26) -> None:
    input_ids = tokens(10)
    greedy = list(reference.generate(input_ids, max_new_tokens=6))
    follow = reference.logprobs(torch.cat((input_ids, torch.tensor(greedy))))
    assert greedy == follow[9:-1].argmax(-1).tolist()[: len(greedy)]
    drawn = [
        list(reference.generate(input_ids, max_new_tokens=6, temperature=2.0, top_p=0.9, seed=3)) for _ in range(2)
    ]
    assert drawn[0] == drawn[1] != greedy


def test_the_published_names_load(tiny_folder: Path) -> None:
    checkpoint = Checkpoint(tiny_folder)
    names = {name for name in checkpoint.table if name.startswith(("vision_tower.", "mm_projector."))}
    assert set(MoonViT(checkpoint.config.vision).state_dict()) == names


def test_yarn_has_the_specifications_values() -> None:
    expected = {0: 1, 1: 0.713111085, 8: 0.0668740305, 9: 0.043776656, 14: 0.00446584875, 19: 0.000158374991,
                20: 1.80702339e-05, 31: 4.38220646e-07}  # fmt: skip
    inv_freq = yarn_inv_freq(TextConfig())
    for index, value in expected.items():
        assert inv_freq[index].item() == pytest.approx(value, rel=1e-5)


def test_router_against_transformers(judge: Any) -> None:
    """The bias takes part in the choice of experts and not in their weights."""
    config = judge.config.text_config
    router = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(0)
    router.weight.data = torch.randn(router.weight.shape, generator=generator) / config.hidden_size**0.5
    router.e_score_correction_bias = torch.randn(config.n_routed_experts, generator=generator)
    logits, expected_weights, expected_ids = router(torch.randn(50, config.hidden_size, generator=generator))
    bias = router.e_score_correction_bias
    topk_weights, topk_ids = route(logits, bias, config.num_experts_per_tok, config.routed_scaling_factor)
    order, expected_order = topk_ids.argsort(-1), expected_ids.argsort(-1)
    assert torch.equal(topk_ids.gather(1, order), expected_ids.gather(1, expected_order))
    torch.testing.assert_close(topk_weights.gather(1, order), expected_weights.gather(1, expected_order))
    assert not torch.equal(topk_ids, route(logits, torch.zeros_like(bias), 2, 1.0)[1])


def test_the_noise_is_what_bfloat16_does_to_the_reference(tiny_folder: Path) -> None:
    reference = KimiK26(Checkpoint(tiny_folder), torch.float32)
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))
    rounded = KimiK26(Checkpoint(tiny_folder)).logprobs(prompt)
    deviation = (rounded - reference.logprobs(prompt)).abs().amax(-1)
    assert BF16_NOISE / 10 < deviation.quantile(0.98).item() < BF16_NOISE
