"""Tests of hybrid runs by SGLang's `--kt-…` flags and by `kt run`: the real server, with a CPU in the GPU's place,
against the reference."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bench.deferred import deferring_model
from click.testing import CliRunner
from support import documented
from support.agreement import assert_same_distribution, assert_same_top, divergence
from support.images import image_part, png, random_image
from support.server import Server
from support.sglang_server import (
    EAGER,
    TWO_RANKS,
    first_tokens,
    generate,
    hybrid_flags,
    needs_fork,
    rows,
    runs_hybrid,
    serve,
)
from support.swarm import metric

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.experts.moving import INTERVAL
from k26_plugins.common.experts.placement import PROFILE_FILE, Profile
from k26_plugins.common.host.cache_folder import cache_folder
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny

pytestmark = runs_hybrid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint with moe_intermediate_size 256, because kt-kernel needs 128 on each of two ranks."""
    folder = tmp_path_factory.mktemp("hybrid") / "tiny"
    make_tiny(folder, TinySizes(moe_intermediate_size=256))
    return folder


@pytest.fixture(scope="module")
def half(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"K26_STREAM_FROM": "64", "K26_MOVE_EXPERTS": "1", **EAGER}
    arguments = [*hybrid_flags(folder, 4), "--enable-metrics"]
    with serve(folder, tmp_path_factory.mktemp("half") / "log", *arguments, **settings) as server:
        yield server


def test_half_of_the_experts_on_each_side_give_the_reference_s_answers(half: Server, folder: Path) -> None:
    assert "4 of 8 experts of each layer on the device (the first)" in half.log.read_text()
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))
    answer = generate(half, prompt.tolist(), 1)
    assert re.search(r"of \d+ tokens [1-4] of the CPU's experts are streamed", half.log.read_text())
    reference = KimiK26(Checkpoint(folder), torch.float32)
    served = rows(answer["meta_info"]["input_top_logprobs"][1:])
    assert_same_distribution(served, reference.logprobs(prompt)[:-1])


def test_chat_and_images(half: Server) -> None:
    assert half.chat("Hello", max_tokens=4)["usage"]["completion_tokens"] > 0
    content = [image_part(png(random_image(100, 80))), {"type": "text", "text": "What?"}]
    assert half.chat(content, max_tokens=4)["usage"]["completion_tokens"] > 0


def test_verify_passes(half: Server, folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden.safetensors"
    command = ["golden", str(folder), "--prompts", str(prompts_file), "--out", str(out), "--answer-tokens", "4"]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    result = CliRunner().invoke(app, ["verify", "--url", half.url, "--golden", str(out)])
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(find_spec("kt_kernel") is None, reason="kt-kernel is not installed in this environment")
def test_two_ranks_with_kt_kernel_and_a_profile_answer_as_one(half: Server, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for file in folder.iterdir():
        (tmp_path / "tiny" / file.name).symlink_to(file)
    Profile(10, [[0] * 8, [1, 5, 0, 5, 0, 0, 0, 4], [3, 0, 5, 0, 1, 1, 1, 1]]).save(tmp_path / "tiny" / PROFILE_FILE)
    command = documented.as_run(documented.HYBRID, tmp_path / "tiny")
    settings = {**TWO_RANKS, **EAGER, "K26_CPU_EXPERTS": "kt"}
    with serve(tmp_path / "tiny", tmp_path / "log", command=command, **settings) as server:
        log = server.log.read_text()
        assert f"by {PROFILE_FILE}, 85% of its uses" in log
        assert "on the CPU (kt)" in log
        # kt-kernel rounds activations to 8 bits, which changes an expert's output by 1.3 %.
        assert_same_top(first_tokens(server), first_tokens(half), noise=0.15)


def test_experts_that_are_used_more_move_to_the_device(half: Server, folder: Path) -> None:
    """A repeated prompt finds more of its experts on the device, with the same answer."""
    prompt = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(1))
    reference = KimiK26(Checkpoint(folder), torch.float32).logprobs(prompt)[:-1]

    def hit_rate() -> float:
        return next(iter(metric(half, "k26_hybrid_hit_rate").values()), 0.0)

    rates = []
    for _ in range(3):
        time.sleep(INTERVAL + 1)
        answer = generate(half, prompt.tolist(), 1)
        assert_same_distribution(rows(answer["meta_info"]["input_top_logprobs"][1:]), reference)
        rates.append(hit_rate())
    assert "experts that are used more took a place on cpu" in half.log.read_text()
    assert rates[-1] > 0.5
    assert rates[-1] >= max(rates) - 1e-6


def test_deferred_experts_are_added_one_layer_later(folder: Path, tmp_path: Path) -> None:
    """The answer is that of the reference with deferred experts, and not that of the reference without."""
    arguments = [*hybrid_flags(folder, 2), "--kt-max-deferred-experts-per-token", "1"]
    prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    with serve(folder, tmp_path / "log", *arguments, **EAGER) as server:
        assert "--kt-max-deferred-experts-per-token 1 changes answers" in server.log.read_text()
        answer = generate(server, prompt.tolist(), 1)
    served = rows(answer["meta_info"]["input_top_logprobs"][1:])

    def median_kl(model: KimiK26) -> float:
        return divergence(served, model.logprobs(prompt)[:-1]).median().item()

    # Rounding may decide which of two experts of equal weight is deferred. That changes a few positions, but not the
    # median.
    to_deferring, to_exact = (
        median_kl(deferring_model(folder, 2, 1)),
        median_kl(KimiK26(Checkpoint(folder), torch.float32)),
    )
    assert to_deferring <= 5e-4
    assert to_exact >= 10 * to_deferring


@needs_fork
def test_kt_run_starts_a_hybrid_run_that_answers_as_one_started_directly(
    half: Server, folder: Path, tmp_path: Path
) -> None:
    """The `kt run` command is the documented one, on two ranks, with the CPU in the GPUs' place."""
    command = [*documented.as_run(documented.KT_RUN, folder), "--attention-backend", "torch_native"]
    # `kt run` leaves files in the home folder for good, so HOME is a scratch folder. The compiled experts are still
    # those in the user's cache folder.
    settings = {**TWO_RANKS, **EAGER, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(cache_folder().parent)}
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with serve(folder, tmp_path / "log", command=command, **settings) as server:
        assert "k26-plugins: hybrid run, 4 of 8 experts of each layer on the device" in server.log.read_text()
        found, expected = (
            rows(generate(one, prompt, 1)["meta_info"]["input_top_logprobs"][1:]) for one in (server, half)
        )
        assert_same_distribution(found, expected)
        assert_same_top(first_tokens(server), first_tokens(half))
