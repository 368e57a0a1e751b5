"""Tests of every kernel and configuration as compiled ahead of time for the six targets: registers, spills, loads,
instructions."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
import triton
from bench.compiled import compile_variant, variants
from k26_kernels.config import INVARIANT, SINGLE
from k26_kernels.target import TARGETS

INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}
REGISTERS = 65536  # an SM's, for all its threads; AMD's limit is 512 for each thread of a wave
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
ALL = [(variant.target, variant.name) for variant in variants()]
GEMMS = [(target, name) for target, name in ALL if name.startswith("w")]


@pytest.fixture(scope="session")
def facts() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the facts about each compiled variant, by target and name."""
    with ProcessPoolExecutor() as pool:
        return {(fact.target, fact.name): asdict(fact) for fact in pool.map(compile_variant, variants())}


def test_every_target_and_gemm_is_there() -> None:
    assert len(set(ALL)) == len(ALL)
    assert {target for target, _ in GEMMS} == set(TARGETS) == set(INSTRUCTION)


@pytest.mark.parametrize(("target", "name"), ALL)
def test_it_fits(facts: dict[tuple[str, str], dict[str, Any]], target: str, name: str) -> None:
    fact = facts[target, name]
    assert fact["spilled_bytes"] == 0
    assert fact["shared_memory"] <= TARGETS[target].shared_memory
    assert 0 < fact["registers"] <= (512 if TARGETS[target].amd else REGISTERS // fact["threads"])


@pytest.mark.parametrize(("target", "name"), ALL)
def test_it_waits_before_it_reads(facts: dict[tuple[str, str], dict[str, Any]], target: str, name: str) -> None:
    """On targets with dependent launches a kernel waits before it reads: a launch that begins while the one before it
    ends would otherwise read what is not written yet."""
    assert facts[target, name]["waits_first"] == TARGETS[target].dependent


@pytest.mark.parametrize(("target", "name"), GEMMS)
def test_it_streams(facts: dict[tuple[str, str], dict[str, Any]], target: str, name: str) -> None:
    """A GEMM uses the target's own matrix instruction and 16-byte loads of weights, and moves no weight between
    threads."""
    fact = facts[target, name]
    assert list(fact["matrix_instructions"]) == [INSTRUCTION[target]]
    loads = dict(fact["weight_loads"])
    assert loads.pop("global_load_dwordx4" if TARGETS[target].amd else "cp.async 16") > 0
    # A chunk's scales are loaded 8 bytes at a time. Where whole tiles are loaded ahead, the table of blocks is loaded
    # ahead too, 4 bytes at a time.
    assert set(loads) <= {"cp.async 8", *(["cp.async 4"] if name.endswith("short") else [])}
    # On sm_90 and sm_100 one shuffle finds the warp that issues the instruction. On gfx950 each copy of tokens to
    # shared memory exchanges their addresses with two shuffles.
    assert fact["shuffles"] <= {"sm_90": 1, "sm_100": 1, "gfx950": 6}.get(target, 0)


@pytest.mark.skipif(OLD, reason="older ones give the hint to other loads only")
@pytest.mark.parametrize(("target", "name"), GEMMS)
def test_weights_that_are_read_once_leave_the_cache_first(
    facts: dict[tuple[str, str], dict[str, Any]], target: str, name: str
) -> None:
    """Weights that only one block reads are loaded with the evict-first hint, on the targets that have such a hint."""
    once = name.split()[1] == SINGLE and not TARGETS[target].amd and target != "sm_80"
    assert (facts[target, name]["evict_first_loads"] > 0) == once


@pytest.mark.parametrize(("target", "name"), [pair for pair in GEMMS if pair[1].split()[1] in (SINGLE, INVARIANT)])
def test_enough_programs_of_a_small_batch_fit_on_an_sm(
    facts: dict[tuple[str, str], dict[str, Any]], target: str, name: str
) -> None:
    """Only several programs at a time keep enough loads in flight: four, or three under Triton 3.5. Where a tile is a
    single step, the step has twice as many bytes, so that two programs are enough."""
    assert facts[target, name]["programs_per_sm"] >= (2 if name.endswith("short") else 3)
