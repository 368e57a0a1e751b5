"""Tests of plans against arithmetic on the specification's figures, which is written out here, and against published
runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from support.documented import ROOT

from k26_plugins.cli import app
from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.advise import choose
from k26_plugins.operate.plan.fit import Load, fit, kv_bytes_per_token
from k26_plugins.operate.plan.gpus import GPUS, SECONDARY, Gpu
from k26_plugins.operate.plan.hardware import HardwareError, named, parse
from k26_plugins.operate.plan.hybrid import expert_slot_bytes
from k26_plugins.operate.plan.speed import decode_bound, experts_touched
from k26_plugins.operate.plan.weights import Layout, LayoutError, check_layout, per_gpu, stages

sys.path.insert(0, str(ROOT / "ci"))
import hardware_table
from published_runs import RUNS, Run

GIB = 2**30
KV = 70_272
PUBLISHED = K26Config()


def weights_by_hand(tp: int) -> float:
    """Return the bytes of weights on a GPU under tensor parallel `tp`, with the vision tower whole on each GPU, from
    docs/model.md, 1.5 and 2."""
    routed = 570_761_441_280
    attention_cut = 61 * 2 * (12288 * 1536 + 16384 * 512 + 7168 * 8192)
    attention_whole = 61 * 2 * (1536 * 7168 + 576 * 7168)
    shared, dense, ends = 2 * 2_642_411_520, 2 * 396_361_728, 2 * 2 * 163840 * 7168
    router = 60 * 384 * (7168 * 2 + 4)
    vision = 2 * (416_866_032 + 54_277_888)
    return (routed + attention_cut + shared + dense + ends) / tp + attention_whole + router + vision


def rest_by_hand(tp: int) -> float:
    """Return the bytes on a GPU for activations of 8192 tokens, sampling of 256 requests, 8192 image tokens, and the
    1.5 GiB that engines keep."""
    hidden = 4 * 8192 * 7168 * 2
    routed = 8192 * 8 * (3 * 2048 / tp + 7168) * 2
    attention = 8192 * 64 / tp * (192 + 192 + 128) * 2
    logits = 6.75 * 256 * 163840 * 4
    vision = 4 * 8192 * (6 * 1152 + 2 * 4304) * 2
    return hidden + routed + attention + logits + vision + 1.5 * GIB


# GPUs, memory in MiB as the driver shows it, tensor parallel size, and whether 131,072 tokens fit.
MACHINES = [
    ("8xH200", 143771, 8, True),
    ("8xB200", 183359, 8, True),
    ("4xB300", 275040, 4, True),
    ("8xMI300X", 196592, 8, True),
    ("8xMI355X", 294912, 8, True),
    ("4x288", 288 * 1024, 4, True),
    ("8xH20", 97871, 8, True),
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


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.gpus}-{run.context_parallel}-{run.kv_tokens}")
def test_published_runs(run: Run) -> None:
    """These are all the runs that could be found, from the logs of those who ran them. The first log also has the
    weights, 71.2 GiB on each GPU."""
    found = hardware_table.planned(run)
    assert found.kv_tokens == pytest.approx(run.kv_tokens, rel=0.04)
    if run is RUNS[0]:
        assert sum(found.weights.values()) / GIB == pytest.approx(71.2, rel=0.005)


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
    # As vLLM does it, the layer that is left over goes to the stage before the last.
    assert [len(layers) for layers in stages(61, 4)] == [15, 15, 16, 15]
    assert [len(layers) for layers in stages(61, 1)] == [61]


def test_expert_parallel_holds_whole_experts() -> None:
    cut, whole = (per_gpu(PUBLISHED, Layout(tp=8, expert_parallel=flag), 0)["routed experts"] for flag in (False, True))
    # A rank has 48 of 384 experts; experts that are cut have their three tensors of shapes on every rank.
    assert whole == 60 * 48 * 24_772_632
    assert cut == pytest.approx(whole, rel=1e-4)


def test_context_parallel_multiplies_the_cache() -> None:
    one, eight = (fit(PUBLISHED, parse("8xH200")[1], Layout(tp=8, context_parallel=n), Load()) for n in (1, 8))
    # The workspace for context parallelism takes memory on every GPU.
    workspace = round(8 * 8 * 0.1 * GIB / KV)
    assert eight.kv_tokens == pytest.approx(8 * one.kv_tokens - workspace, rel=1e-3)


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
        ("8x5090", (8, "RTX5090")),
        ('4x"RTX 4090 48GB"', (4, "RTX4090 48GB")),
        ("A100-SXM4-40GB", (1, "A10040GB")),
        ("H100 96GB", (1, "H100 96GB")),
        ("8 x H200 141GB", (8, "H200")),
    ],
)
def test_gpus_by_name(request_: str, expected: tuple[int, str]) -> None:
    count, gpu = parse(request_)
    assert (count, gpu.name) == expected


# The names that nvidia-smi and amd-smi print, and the name in the table.
DRIVERS = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100PCIE",
    "NVIDIA H100 NVL": "H100NVL",
    "NVIDIA H800": "H800",
    "NVIDIA H20": "H20",
    "NVIDIA H20-3e": "H203E",
    "NVIDIA H200": "H200",
    "NVIDIA H200 NVL": "H200NVL",
    "NVIDIA GH200 480GB": "GH200",
    "NVIDIA GH200 144G HBM3e": "GH200144GB",
    "NVIDIA B200": "B200",
    "NVIDIA B300 SXM6 AC": "B300",
    "NVIDIA GB200": "GB200",
    "NVIDIA GB300": "GB300",
    "NVIDIA GB10": "GB10",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A100-SXM4-40GB": "A10040GB",
    "NVIDIA RTX A6000": "A6000",
    "NVIDIA RTX 6000 Ada Generation": "RTX6000ADA",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTXPRO6000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "RTXPRO6000",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI300X OAM": "MI300X",
    "AMD Instinct MI325X": "MI325X",
    "AMD Instinct MI350X": "MI350X",
    "AMD Instinct MI355X": "MI355X",
}


def test_gpus_by_their_drivers_names() -> None:
    assert {driver: (named(driver) or GPUS[0]).name for driver in DRIVERS} == DRIVERS
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


@pytest.mark.parametrize(
    ("request_", "gibibytes"), [("RTX 4090 48GB", 48), ("3090 48GB", 48), ("A100 40GB", 40), ("H20 96GB", 95.6)]
)
def test_a_stated_size_wins(request_: str, gibibytes: float) -> None:
    assert parse(request_)[1].memory / GIB == pytest.approx(gibibytes, abs=0.1)


@pytest.mark.parametrize("request_", ["8xTPU", "8x6000", "8x0", "0xH100", "2x1", "8xH100 2000GB", "x", "4x RTX"])
def test_an_unknown_gpu_is_answered(request_: str) -> None:
    with pytest.raises(HardwareError, match=r"memory size in GiB(.|\n)*RTX5090"):
        parse(request_)


def plan(*options: str, code: int | None = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *options, "--json"])
    assert code is None or result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


def test_four_h100_do_not_fit_and_what_does() -> None:
    found = plan("--gpus", "4xH100", code=1)
    assert "the weights alone do not fit" in found["why"]
    assert found["command"] is None
    assert found["commands"] == []
    advice = [shlex.join(item["options"]) for item in found["advice"]]
    for works in ("--gpus 4xB200", "--gpus 16xH100", "--gpus 4xH100 --engine ktransformers"):
        assert any(line.startswith(works) for line in advice), advice


@pytest.mark.parametrize(
    "options",
    [
        ["--gpus", "8xH100", "--context", "262144"],
        ["--gpus", "8xRTXPRO6000", "--context", "200000", "--concurrency", "30"],
        ["--gpus", "4xB200", "--context", "30000", "--images", "3", "--concurrency", "40"],
        ["--gpus", "8xH200", "--concurrency", "1000", "--gpu-memory-utilization", "0.8"],
        ["--gpus", "4xH200", "--engine", "sglang"],
        ["--gpus", "3x24", "--engine", "ktransformers"],
        ["--gpus", "2xA6000", "--engine", "ktransformers", "--ram", "256"],
        ["--gpus", "4xRTX 4090 48GB"],
    ],
)
def test_advice_is_plannable(options: list[str]) -> None:
    advice = plan(*options, code=1)["advice"]
    assert advice
    for item in advice:
        # The engine is the one that was asked for, unless the advice names another.
        engine = options[options.index("--engine") :][:2] if "--engine" in options else []
        assert plan(*engine, *item["options"])["fits"], item


@pytest.mark.parametrize("engine", ["vllm", "sglang", "ktransformers"])
def test_commands_run_on_the_gpus_that_were_planned(engine: str) -> None:
    """For every number of GPUs, the sizes in each command multiply to the GPUs that the plan uses, at most eight of
    each machine."""
    for count in range(1, 33):
        found = plan("--gpus", f"{count}x288", "--engine", engine, "--context", "4096", "--ram", "900", code=None)
        if not found["fits"]:
            continue
        commands = found["commands"]
        assert len(commands) == found["nodes"]
        for rank, command in enumerate(commands):
            sizes = [
                int(command[at + 1])
                for at, word in enumerate(command)
                if re.fullmatch(r"--(tensor-parallel|tp|pipeline-parallel|pp)-size", word)
            ]
            product = 1
            for size in sizes:
                product *= size
            assert product == found["gpus_used"]
            assert product <= 8 * len(commands)
            assert found["tensor_parallel"] <= product // len(commands)
            if len(commands) > 1:
                assert command[command.index("--nnodes") + 1] == str(len(commands))
                assert command[command.index("--node-rank") + 1] == str(rank)
        assert found["gpus_used"] == count or engine == "ktransformers"


def test_three_small_gpus_and_the_hybrid_run() -> None:
    found = plan("--gpus", "3xA6000", "--ram", "768", "--engine", "ktransformers", "--context", "16384")
    assert found["gpus_used"] == 2
    assert (
        "of which 2 are used"
        in CliRunner()
        .invoke(app, ["plan", "--gpus", "3xA6000", "--ram", "768", "--engine", "ktransformers", "--context", "16384"])
        .output
    )


def test_two_machines_are_said() -> None:
    text = CliRunner().invoke(app, ["plan", "--gpus", "16xH100", "--engine", "sglang"]).output
    for line in (
        "in 2 machines of 8",
        "--dist-init-addr HEAD_ADDRESS:20000 --node-rank 1",
        "--nnodes 2 --use-ray",
        "ray start --head",
    ):
        assert line in text


def test_memory_utilization_reaches_plan_and_command() -> None:
    low, high = (plan("--gpus", "8xH200", "--gpu-memory-utilization", value) for value in ("0.8", "0.9"))
    assert high["kv_tokens"] - low["kv_tokens"] == pytest.approx(0.1 * 143771 * 2**20 / KV, rel=0.01)
    assert low["command"][low["command"].index("--gpu-memory-utilization") + 1] == "0.80"


@pytest.mark.parametrize("checkpoint", ["./nowhere", "/nowhere/at/all"])
def test_a_checkpoint_that_is_not_there(checkpoint: str) -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "8xH200", "--checkpoint", checkpoint])
    assert result.exit_code == 1
    assert "does not exist" in result.output


def test_the_hybrid_run_by_hand() -> None:
    """Experts take the memory of 4 × H100 that attention, shared experts, embedding, head, vision and 131,072 tokens
    leave, in slots of 1.384 GiB over the four GPUs."""
    found = plan("--gpus", "4xH100", "--engine", "ktransformers", "--ram", "768")
    # SGLang holds kv_b_proj a second time, turned.
    plain = weights_by_hand(4) + 61 * 2 * 16384 * 512 / 4 - 570_761_441_280 / 4
    free = 0.9 * 81559 * 2**20 - plain - rest_by_hand(4) - 131_072 * KV
    assert found["gpu_experts"] == pytest.approx(free * 4 / (60 * 24_772_632), abs=1)
    assert "--kt-num-gpu-experts" in found["command"]
    assert str(found["gpu_experts"]) in found["command"]
    # System memory has to hold the other experts, and 30 GB for all else.
    needed = (384 - found["gpu_experts"]) * 60 * 24_772_632 + 30e9
    short = plan("--gpus", "4xH100", "--engine", "ktransformers", "--ram", "256", code=1)
    assert f"must be {needed / 1e9:.0f} GB and is 256 GB" in short["why"]


def test_what_is_fitted_is_said() -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "8xH200"])
    assert "1.50 GiB  (fitted to the published runs" in result.output
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
    """For one request on 8 × H200 the bound is 4.8 TB/s divided by the bytes that a token reads from each GPU's
    memory."""
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


@pytest.mark.parametrize("absorbed_copy", [False, True])
def test_a_token_reads_as_much_in_stages_as_in_one(absorbed_copy: bool) -> None:
    """Pipeline stages run one after the other and share the weights, so they do not change the bound for one request.

    The layers do not divide evenly among three stages; the first stage has the embedding and the last one the head.
    """
    (_, gpu) = parse("8xH200")
    whole, cut = (
        decode_bound(PUBLISHED, fit(PUBLISHED, gpu, Layout(tp=8, pp=pp, absorbed_copy=absorbed_copy), Load()), 1, 1024)
        for pp in (1, 3)
    )
    assert cut == pytest.approx(whole, rel=1e-6)


def test_a_request_longer_than_the_model_is_refused() -> None:
    result = CliRunner().invoke(app, ["plan", "--gpus", "8xH200", "--context", "300000"])
    assert result.exit_code == 1
    assert "longer than the model's 262,144" in result.output


VENDORS = {"nvidia": "nvidia.com", "amd": "amd.com"}
# No page of the vendors about these GPUs could be found.
OF_ONE_MARKET = {"A800", "H800", "H20", "H203E", "L20", "MI308X"}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_has_its_source(gpu: Gpu) -> None:
    """The source is the vendor's own page, or a secondary page that is listed as such; docs/hardware.md links to it."""
    address = urlsplit(gpu.link)
    assert address.scheme == "https"
    assert len(address.path) > 1
    assert (gpu.link in SECONDARY) == (gpu.name in OF_ONE_MARKET)
    if gpu.link not in SECONDARY:
        assert str(address.hostname).endswith(VENDORS[gpu.vendor])
    assert any(
        line.startswith(f"| {gpu.name} |") and f"({gpu.link})" in line
        for line in hardware_table.FILE.read_text(encoding="utf-8").splitlines()
    )


def test_a_plan_says_where_its_gpu_is_published() -> None:
    assert plan("--gpus", "8xH200")["gpu_link"] == "https://www.nvidia.com/en-us/data-center/h200/"
    assert plan("--gpus", "8x141")["gpu_link"] == ""
