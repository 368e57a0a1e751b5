"""Tests of what `k26 verify` finds and names in many runs with seeded faults, and in many clean runs that round in
their own way."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.endpoint import Fault
from support.seeded import Seeded, bias_off, draw, expert_scaled, make_golden, theta_off, verdict_of

from k26_plugins.common.model.config import K26Config
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny
from k26_plugins.operate.golden import Golden
from k26_plugins.operate.verify.judge import Verdict

ROUNDING = (0.0, 2**-12, 2**-11, 2**-10, 2**-9)
HELD_OUT_SEED = 4052


@pytest.fixture(scope="module")
def golden(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return make_golden(tiny_folder, tmp_path_factory.mktemp("golden"), prompts=6, tokens=300, seed=3)


def causes(verdict: Verdict) -> str:
    return "; ".join(cause.what for cause in verdict.causes)


FAULTS = {
    "an expert's down × 1.3": (expert_scaled(2, 5, "down", 1.3), "routed expert 5 of layer 2"),
    "a bias + 0.1": (bias_off(2, 6, 0.1), "bias of expert 6 in layer 2, too high"),
    "a bias - 0.03": (bias_off(1, 6, -0.03), "bias of expert 6 in layer 1, too low"),
    "theta - 5 %": (theta_off(0.95), "positions"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_named(tiny_folder: Path, golden: Golden, name: str) -> None:
    fault, cause = FAULTS[name]
    verdict = verdict_of(tiny_folder, golden, fault, 2**-11)
    assert not verdict.passed
    assert cause in causes(verdict)


def test_another_rounding_is_no_fault(tiny_folder: Path, golden: Golden) -> None:
    verdict = verdict_of(tiny_folder, golden, Fault(), 2**-9)
    assert verdict.passed, verdict.checks
    assert "0 of 16 experts saw too few tokens" in verdict.smallest


def test_a_cause_that_does_not_stand_out_is_not_named(tiny_folder: Path, golden: Golden) -> None:
    """If every token goes to the same experts in both layers, an expert of one layer explains as much as the same
    expert of the other."""
    alike = [
        replace(prompt, experts=prompt.experts[:, [1, 1]], gaps=prompt.gaps[:, [1, 1]]) for prompt in golden.prompts
    ]
    verdict = verdict_of(tiny_folder, Golden(golden.info, alike), FAULTS["an expert's down × 1.3"][0])
    assert not verdict.passed
    assert causes(verdict) == "cannot tell"
    assert all(f"routed expert 5 of layer {layer}" in verdict.causes[0].evidence for layer in (1, 2))


def test_the_tokens_that_each_expert_saw(golden: Golden) -> None:
    tokens = golden.tokens_by_expert()
    positions = sum(len(prompt.top_ids) for prompt in golden.prompts)
    assert tokens.sum(1).tolist() == [2 * positions] * 2
    expert = torch.cat([prompt.experts[:, 1, :2] for prompt in golden.prompts]).eq(5).any(-1).sum()
    assert tokens[1, 5] == expert


def test_twenty_prompts_take_seconds(tmp_path: Path) -> None:
    """A golden file for a model of this size and as many prompts once was not done after 166 s of a core's time."""
    make_tiny(tmp_path / "tiny", TinySizes(layers=12))
    assert sum(file.stat().st_size for file in (tmp_path / "tiny").iterdir()) > 22e6
    started = time.process_time()
    make_golden(tmp_path / "tiny", tmp_path, prompts=20, tokens=100, seed=5)
    assert time.process_time() - started < 60


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Golden]:
    """Return a checkpoint, and a golden file for prompts of 8,000 tokens, on which the bounds were not set."""
    work = tmp_path_factory.mktemp("held out")
    make_tiny(work / "tiny", seed=2)
    return work / "tiny", make_golden(work / "tiny", work, prompts=20, tokens=400, seed=4)


@pytest.mark.long
def test_no_clean_run_of_fifty_fails(held_out: tuple[Path, Golden]) -> None:
    for seed in range(50):
        assert verdict_of(*held_out, Fault(), ROUNDING[seed % len(ROUNDING)], seed).passed, seed


def held_out_faults(folder: Path) -> list[Seeded]:
    factors, errors = [1.1, 1.2, 1.5, 0.8, 0.0], [0.03, 0.05, 0.2]
    return list(draw(K26Config.from_path(folder), HELD_OUT_SEED, 20, factors, errors))


@pytest.mark.long
def test_the_faults_of_a_list_that_nothing_was_tuned_on(held_out: tuple[Path, Golden]) -> None:
    found = [
        (seeded, verdict_of(*held_out, seeded.fault, seeded.rounding, seeded.seed))
        for seeded in held_out_faults(held_out[0])
    ]
    missed = [seeded.name for seeded, verdict in found if verdict.passed]
    wrong = [(seeded.name, causes(verdict)) for seeded, verdict in found if seeded.cause not in causes(verdict)]
    assert len(missed) <= 1, missed
    assert len(wrong) <= 1, wrong
