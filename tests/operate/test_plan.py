"""Plans against arithmetic on the specification's figures, written out here, and its measured 8 × H200 run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from k26_plugins.cli import app
from k26_plugins.common.config import K26Config
from k26_plugins.operate.plan.advise import choose
from k26_plugins.operate.plan.fit import Load, fit, kv_bytes_per_token
from k26_plugins.operate.plan.hardware import HardwareError, parse
from k26_plugins.operate.plan.hybrid import expert_slot_bytes
from k26_plugins.operate.plan.speed import experts_touched
from k26_plugins.operate.plan.weights import Layout, LayoutError, check_layout, per_gpu, stages

GIB = 2**30
KV = 70_272
PUBLISHED = K26Config()


def weights_by_hand(tp: int) -> float:
    """Specification 1.5 and 2: bytes on a GPU under tensor parallel `tp`, the vision tower whole on each."""
    routed = 570_761_441_280
    attention_cut = 61 * 2 * (12288 * 1536 + 16384 * 512 + 7168 * 8192)
    attention_whole = 61 * 2 * (1536 * 7168 + 576 * 7168)
    shared, dense, ends = 2 * 2_642_411_520, 2 * 396_361_728, 2 * 2 * 163840 * 7168
    router = 60 * 384 * (7168 * 2 + 4)
    vision = 2 * (416_866_032 + 54_277_888)
    return (routed + attention_cut + shared + dense + ends) / tp + attention_whole + router + vision


def rest_by_hand(tp: int) -> float:
    """Activations of 8192 tokens, logits of 1024 requests, 8192 image tokens, and 5 GiB that engines keep."""
    hidden = 4 * 8192 * 7168 * 2
    routed = 8192 * 8 * (3 * 2048 / tp + 7168) * 2
    attention = 8192 * 64 / tp * (192 + 192 + 128) * 2
    logits = 2 * 1024 * 163840 * 4
    vision = 4 * 8192 * (6 * 1152 + 2 * 4304) * 2
    return hidden + routed + attention + logits + vision + 5 * GIB


# GPUs, memory in MiB as the driver shows it, tensor and pipeline parallel, and whether 131,072 tokens fit.
MACHINES = [
    ("8xH200", 143771, 8, True),
    ("8xB200", 183359, 8, True),
    ("4xB300", 275040, 4, True),
    ("8xMI300X", 196592, 8, True),
    ("8xMI355X", 294912, 8, True),
    ("4x288", 288 * 1024, 4, True),
    ("8xH20", 97871, 8, False),
    ("8xH100", 81559, 8, False),
    ("4xH100", 81559, 4, False),
    ("4xH200", 143771, 4, False),
    ("8xA100", 81920, 8, False),
]


@pytest.mark.parametrize(("gpus", "mebibytes", "tp", "fits"), MACHINES)
def test_machines_by_hand(gpus: str, mebibytes: int, tp: int, fits: bool) -> None:
    count, gpu = parse(gpus)
    assert (count, gpu.memory) == (tp, mebibytes * 2**20)
    found = fit(PUBLISHED, gpu, Layout(tp=tp), Load())
    assert sum(found.weights.values()) == pytest.approx(weights_by_hand(tp), rel=1e-3)
    left = 0.9 * mebibytes * 2**20 - weights_by_hand(tp) - rest_by_hand(tp)
    assert found.kv_tokens == pytest.approx(max(left / KV, 0), rel=0.03, abs=64)
    assert found.fits == fits


def test_the_published_run() -> None:
    """Specification 6: vLLM on 8 × H200, 71.2 GiB of weights on each (0.1 GiB are tables of rotations, which the plan has
    elsewhere), 711,296 tokens at 0.90. What engines keep is fitted to it."""
    found = fit(PUBLISHED, parse("8xH200")[1], Layout(tp=8, vision_whole=False), Load())
    assert sum(found.weights.values()) / GIB == pytest.approx(71.2, rel=0.005)
    assert found.kv_tokens == pytest.approx(711_296, rel=0.03)


def test_specification_figures() -> None:
    assert kv_bytes_per_token(PUBLISHED.text, "bf16") == KV
    assert kv_bytes_per_token(PUBLISHED.text, "fp8") == KV // 2
    assert expert_slot_bytes(PUBLISHED) / GIB == pytest.approx(1.384, rel=1e-3)
    assert sum(per_gpu(PUBLISHED, Layout(), 0).values()) == 595_148_192_736
    turned = sum(per_gpu(PUBLISHED, Layout(tp=8, absorbed_copy=True), 0).values())
    assert turned - sum(per_gpu(PUBLISHED, Layout(tp=8), 0).values()) == 61 * 16384 * 512 * 2 // 8
    assert experts_touched(PUBLISHED, 1) == pytest.approx(8)


def test_pipeline_stages_hold_every_byte_once() -> None:
    held = [per_gpu(PUBLISHED, Layout(pp=4), stage) for stage in range(4)]
    assert sum(sum(parts.values()) for parts in held) == 595_148_192_736
    # As vLLM: the layer that is left over goes to the stage before the last.
    assert [len(layers) for layers in stages(61, 4)] == [15, 15, 16, 15]
    assert [len(layers) for layers in stages(61, 1)] == [61]


def test_expert_parallel_holds_whole_experts() -> None:
    cut, whole = (per_gpu(PUBLISHED, Layout(tp=8, expert_parallel=flag), 0)["routed experts"] for flag in (False, True))
    # 48 of 384 experts; cut ones have their three shapes on every rank.
    assert whole == 60 * 48 * 24_772_632
    assert cut == pytest.approx(whole, rel=1e-4)


def test_context_parallel_multiplies_the_cache() -> None:
    one, eight = (fit(PUBLISHED, parse("8xH200")[1], Layout(tp=8, context_parallel=n), Load()) for n in (1, 8))
    assert eight.kv_tokens == pytest.approx(8 * one.kv_tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=3), "64 attention heads"),
        (Layout(tp=32, vision_whole=False), "vision tower's 16 heads"),
        (Layout(pp=62), "61 layers"),
        (Layout(tp=8, context_parallel=3), "decode-context"),
    ],
)
def test_layouts_that_cannot_be(layout: Layout, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(PUBLISHED, layout)


def test_sixteen_h100_take_two_nodes() -> None:
    found = choose(PUBLISHED, parse("H100")[1], 16, Load(), "vllm")
    assert (found.layout.tp, found.layout.pp) == (8, 2)
    assert found.fits


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("4 x H100", (4, "H100")),
        ("8×NVIDIA H100 80GB", (8, "H100")),
        ("RTX PRO 6000", (1, "RTXPRO6000")),
        ("8x96", (8, "96 GiB")),
        ("2 * 48GB", (2, "48 GiB")),
    ],
)
def test_gpus_by_name(request_: str, expected: tuple[int, str]) -> None:
    count, gpu = parse(request_)
    assert (count, gpu.name) == expected


def test_an_unknown_gpu_is_answered() -> None:
    with pytest.raises(HardwareError, match="memory size in GiB"):
        parse("8xTPU")


def plan(*options: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *options, "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_four_h100_do_not_fit_and_what_does() -> None:
    found = plan("--gpus", "4xH100", code=1)
    assert "the weights alone do not fit" in found["why"]
    assert found["command"] is None
    advice = " ".join(found["advice"])
    for works in ("16 × H100", "4 × B200", "KTransformers"):
        assert works in advice


def test_the_hybrid_run_by_hand() -> None:
    """4 × H100: what attention, shared experts, ends, vision and 131,072 tokens leave, in slots of 1.384 GiB over 4 GPUs."""
    found = plan("--gpus", "4xH100", "--engine", "ktransformers", "--ram", "768")
    # SGLang holds kv_b_proj a second time, turned.
    plain = weights_by_hand(4) + 61 * 2 * 16384 * 512 / 4 - 570_761_441_280 / 4
    free = 0.9 * 81559 * 2**20 - plain - rest_by_hand(4) - 131_072 * KV
    assert found["gpu_experts"] == pytest.approx(free * 4 / (60 * 24_772_632), abs=1)
    assert "--kt-num-gpu-experts" in found["command"]
    assert str(found["gpu_experts"]) in found["command"]
    # The experts that are left, and 30 GB for all else.
    needed = (384 - found["gpu_experts"]) * 60 * 24_772_632 + 30e9
    short = plan("--gpus", "4xH100", "--engine", "ktransformers", "--ram", "256", code=1)
    assert f"must be {needed / 1e9:.0f} GB and is 256 GB" in short["why"]


def test_what_is_fitted_is_said() -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "8xH200"])
    assert "5.00 GiB  (fitted to the one published run" in result.output
    assert "fitted" in plan("--gpus", "8xH200")["overhead_source"]


def test_the_load_counts_images_and_requests() -> None:
    """100 requests of 8,000 tokens and two images of 4,225 need 1,645,000 tokens: no H200 has room for all of them."""
    found = plan("--gpus", "8xH200", "--context", "8000", "--images", "2", "--concurrency", "100")
    assert found["context_parallel"] == 4
    assert "--decode-context-parallel-size" in found["command"]
    assert found["largest_concurrency"] == found["kv_tokens"] // 16_450
    stages_of_sglang = plan(
        "--gpus", "8xH200", "--engine", "sglang", "--context", "8000", "--images", "2", "--concurrency", "100"
    )
    assert stages_of_sglang["pipeline_parallel"] > 1


def test_the_bound_on_decoding_by_hand() -> None:
    """One request on 8 × H200: what a token reads of each GPU's memory, over 4.8 TB/s."""
    found = plan("--gpus", "8xH200", "--context", "1024")
    attention_cut = 61 * 2 * (12288 * 1536 + 16384 * 512 + 7168 * 8192)
    whole = 61 * 2 * (1536 * 7168 + 576 * 7168) + 60 * 384 * (7168 * 2 + 4)
    routed = 60 * 8 * 24_772_632
    cut = attention_cut + 2 * 2_642_411_520 + 2 * 396_361_728 + 2 * 163840 * 7168 + routed
    expected = 4.8e12 / (cut / 8 + whole + 1024 * KV)
    assert found["bounds_tokens_per_second"]["GPU memory, 1 at once"] == pytest.approx(expected, rel=1e-3)
    # A second copy that another engine holds is not read.
    other = plan("--gpus", "8xH200", "--engine", "sglang", "--context", "1024")
    assert other["bounds_tokens_per_second"] == pytest.approx(found["bounds_tokens_per_second"])


def test_a_request_longer_than_the_model_is_refused() -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "8xH200", "--context", "300000"])
    assert result.exit_code == 1
    assert "longer than the model's 262,144" in result.output
