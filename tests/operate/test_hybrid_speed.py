"""Tests of a hybrid run's predicted speed against arithmetic on the specification's figures, which is written out
here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from k26_plugins.cli import app
from k26_plugins.common.expert_costs import Line
from k26_plugins.common.model.config import K26Config
from k26_plugins.operate import hybrid_rates
from k26_plugins.operate.plan.advise import choose
from k26_plugins.operate.plan.fit import Load
from k26_plugins.operate.plan.hardware import parse
from k26_plugins.operate.plan.hybrid import hybrid
from k26_plugins.operate.plan.hybrid_speed import Rates, decode_step, fastest, prefill_step, threads_of

PUBLISHED = K26Config()
RAM = 768 * 10**9
# Bytes and operations of an expert: 7168 by 2048, three projections, four bits and a bfloat16 scale for 32 weights.
EXPERT, PAIR = 3 * 7168 * 2048 * (0.5 + 2 / 32), 6 * 7168 * 2048
HOST = Line(100e-6, 10e-6)


def test_the_cpu_computes_its_share_of_a_prompt_alone_where_no_link_is() -> None:
    found = choose(PUBLISHED, parse("H100")[1], 4, Load(), "ktransformers")
    plan = hybrid(PUBLISHED, found, RAM)
    assert 0 < plan.gpu_experts < 384
    step = prefill_step(PUBLISHED, found, plan, Rates(host=HOST), chunk=8192, before=0)
    on_host = 384 - plan.gpu_experts
    assert step.cpu == pytest.approx(60 * on_host * (100e-6 + 10e-6 * 8192 * 8 / 384), rel=0.01)
    assert step.total > step.cpu


def test_a_fast_link_leaves_the_cpu_little_of_a_prompt() -> None:
    """Streamed experts take the time of copying their bytes, and both sides end at the same time."""
    found = choose(PUBLISHED, parse("H100")[1], 4, Load(), "ktransformers")
    plan = hybrid(PUBLISHED, found, RAM)
    on_host = 384 - plan.gpu_experts
    link = 100e9
    alone, helped = (
        prefill_step(PUBLISHED, found, plan, Rates(host=HOST, link=each), chunk=8192, before=0).cpu
        for each in (None, link)
    )
    assert alone is not None
    each_there, each_here = EXPERT / link, 100e-6 + 10e-6 * 8192 * 8 / 384
    together = on_host / (1 / each_there + 1 / each_here)
    assert helped == pytest.approx(60 * together, rel=0.03)
    assert helped < alone / 5


def test_a_gpu_s_arithmetic_is_a_prompt_s_where_it_was_measured() -> None:
    """The tokens before a chunk count for much: 32,768 of them at least double the chunk's attention."""
    found = choose(PUBLISHED, parse("H100")[1], 4, Load(), "ktransformers")
    plan = hybrid(PUBLISHED, found, RAM)
    rates = Rates(host=Line(0.0, 0.0), link=1e15, gpu_gemm=600e12)
    step = prefill_step(PUBLISHED, found, plan, rates, chunk=8192, before=0)
    # From docs/model.md: a token's multiplications in attention, shared experts, dense layer and head are cut over four
    # GPUs; those in the projections to the low ranks and in the router are done whole by each GPU.
    cut = 61 * (12288 * 1536 + 16384 * 512 + 7168 * 8192) + 3 * 7168 * 18432 + 163840 * 7168 + 60 * 3 * 7168 * 2048
    cut += 4 * (61 * 7168 * (1536 + 576) + 60 * 384 * 7168)
    routed = 60 * 8 * 3 * 7168 * 2048 * plan.gpu_experts / 384
    attended = 61 * 8192 / 2 * 64 * (192 + 128)
    expected = 2 * 8192 * (cut + routed + attended) / (4 * 600e12 * 0.6)
    assert step.gpu == pytest.approx(expected, rel=0.02)
    later = prefill_step(PUBLISHED, found, plan, rates, chunk=8192, before=32768)
    more = 2 * 8192 * 32768 * 61 * 64 * (192 + 128) / (4 * 600e12 * 0.6)
    assert later.gpu - step.gpu == pytest.approx(more, rel=0.03)


def test_more_requests_read_more_experts() -> None:
    found = choose(PUBLISHED, parse("H100")[1], 4, Load(), "ktransformers")
    plan = hybrid(PUBLISHED, found, RAM)
    steps = [
        decode_step(PUBLISHED, found, plan, Rates(host=HOST), sequences=count, context=1000, in_graph=True)
        for count in (1, 16)
    ]
    share = 1 - plan.gpu_experts / 384
    assert steps[0].cpu == pytest.approx(60 * 8 * share * (100e-6 + 10e-6))
    touched = 384 * (1 - (1 - 8 / 384) ** 16)
    assert steps[1].cpu == pytest.approx(60 * share * (touched * 100e-6 + 16 * 8 * 10e-6))


def test_the_chunk_is_the_one_with_which_a_request_ends_first() -> None:
    slow_link = Rates(host=Line(100e-6, 1e-3), link=20e9, gpu_gemm=600e12)
    found = choose(PUBLISHED, parse("H100")[1], 4, Load(), "ktransformers")
    best = fastest(PUBLISHED, found, RAM, slow_link)
    assert best is not None
    fit, plan, speed = best
    assert speed.chunk == fit.load.batched_tokens > 8192
    # The larger chunk's activations leave the GPUs fewer experts.
    assert plan.gpu_experts < hybrid(PUBLISHED, found, RAM).gpu_experts
    # A request that spends little of its time on its prompt has no larger chunk.
    answers = fastest(
        PUBLISHED, choose(PUBLISHED, parse("H100")[1], 4, Load(context=2048), "ktransformers"), RAM, slow_link
    )
    assert answers is not None
    assert answers[2].chunk == 2048
    # If the GPUs are nearly full, no larger chunk fits.
    full = choose(PUBLISHED, parse("RTX4090")[1], 2, Load(context=32768), "ktransformers")
    assert hybrid(PUBLISHED, full, RAM).gpu_experts < 4
    tight = fastest(PUBLISHED, full, RAM, slow_link)
    assert tight is not None
    assert tight[2].chunk <= 8192
    assert fastest(PUBLISHED, full, 10**9, slow_link) is None


def test_a_core_is_left_to_each_rank_where_there_are_many() -> None:
    assert [threads_of(cores, ranks) for cores, ranks in ((2, 1), (64, 4), (16, 4), (8, 1))] == [2, 60, 16, 7]


def test_the_command_measures_this_machine(tiny_folder: Path) -> None:
    command = ["plan", "--gpus", "2xRTX4090", "--engine", "ktransformers", "--ram", "64", "--cores", "32"]
    command += ["--context", "8192", "--checkpoint", str(tiny_folder), "--measure"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    speed = found["predicted"]
    assert speed["prompt_tokens"] + speed["answer_tokens"] == 8192
    assert 0 < speed["graph"]["total"] < speed["waiting"]["total"] < 1
    options = dict(zip(found["command"], found["command"][1:], strict=False))
    assert options["--chunked-prefill-size"] == str(speed["chunk"])
    assert options["--kt-cpuinfer"] == "30"
    shown = CliRunner().invoke(app, command).stdout
    assert "predicted for one request of 8,192 tokens, 1,024 of them its answer" in shown
    assert shlex.join(["--chunked-prefill-size", str(speed["chunk"])]) in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8xH200"], "--measure is for --engine ktransformers"),
        (["--gpus", "2x48", "--engine", "ktransformers", "--ram", "700"], "no bandwidth is known of 48 GiB"),
    ],
)
def test_what_cannot_be_predicted_is_said(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *options, "--measure"])
    assert result.exit_code == 1
    assert message in result.output


@pytest.mark.gpu
def test_links_and_products_are_measured_on_a_gpu() -> None:
    assert torch.cuda.is_available()
    link, product = hybrid_rates.links_rate(), hybrid_rates.gpu_gemm_rate()
    assert link is not None
    assert product is not None
    assert 1e9 < link < 5e12
    assert 1e12 < product < 1e16
