"""Tests of the instructions by which the lanes of a warp exchange values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.ptx.memory import PtxError

Run = Callable[..., Any]
THREADS = 64
VALUES = np.random.default_rng(0).integers(0, 1 << 32, THREADS, dtype=np.uint32)


def source_lane(mode: str, lane: int, b: int, c: int) -> int:
    """Return the lane from which `shfl` takes a lane's value, by the ISA's pseudocode."""
    bval, cval, segmask = b & 31, c & 31, c >> 8 & 31
    max_lane = (lane & segmask) | (cval & ~segmask)
    min_lane = lane & segmask
    if mode == "up":
        j = lane - bval
        return j if j >= max_lane else lane
    j = {"down": lane + bval, "bfly": lane ^ bval, "idx": min_lane | (bval & ~segmask)}[mode]
    return j if j <= max_lane else lane


@pytest.mark.parametrize("opcode", [f"shfl.sync.{mode}.b32" for mode in ("up", "down", "bfly", "idx")])
@pytest.mark.parametrize("c", [31, 0, 7, 0x1807, 0x1C03, 0x181F, 0x101F], ids=hex)
def test_shfl(run: Run, opcode: str, c: int) -> None:
    """Amounts are taken modulo 32. The segments are as wide as a warp, as half of it, and so on."""
    amounts = [0, 1, 3, 4, 16, 31, 33, 0xFFFFFFFF]
    text = "\n".join(f"{opcode} %r{10 + n}, %r1, {b:#x}, {c:#x}, -1;" for n, b in enumerate(amounts))
    machine = run(text, {"%r1": VALUES})
    for n, b in enumerate(amounts):
        chosen = [lane // 32 * 32 + source_lane(opcode.split(".")[2], lane % 32, b, c) for lane in range(THREADS)]
        assert np.array_equal(machine.registers[f"%r{10 + n}"], VALUES[chosen])


def test_shfl_with_an_amount_for_each_lane(run: Run) -> None:
    amounts = np.random.default_rng(1).integers(0, 32, THREADS)
    machine = run("shfl.sync.idx.b32 %r9, %r1, %r2, 31, -1;", {"%r1": VALUES, "%r2": amounts})
    assert np.array_equal(machine.registers["%r9"], VALUES[np.arange(THREADS) // 32 * 32 + amounts])


def test_a_value_of_a_lane_that_is_not_here(run: Run) -> None:
    text = "setp.lt.u32 %p1, %r1, 4;\n@%p1 shfl.sync.bfly.b32 %r9, %r1, 4, 31, -1;"
    with pytest.raises(PtxError, match="not here"):
        run(text, {"%r1": range(32)})


REDUCE: dict[str, Callable[..., int]] = {"add": lambda values: sum(values) % (1 << 32), "min": min, "max": max}


@pytest.mark.parametrize("opcode", [f"redux.sync.{name}.{kind}" for name in REDUCE for kind in ("s32", "u32")])
def test_redux(run: Run, opcode: str) -> None:
    machine = run(f"{opcode} %r9, %r1, -1;", {"%r1": VALUES})
    numbers = (VALUES.view(np.int32) if opcode.endswith("s32") else VALUES).tolist()
    expected = [REDUCE[opcode.split(".")[2]](numbers[first : first + 32]) % (1 << 32) for first in (0, 32)]
    assert machine.registers["%r9"].tolist() == [expected[0]] * 32 + [expected[1]] * 32


@pytest.mark.parametrize(
    "text",
    [
        "redux.sync.add.s32 %r9, %r1, 0xFFFF;",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 redux.sync.add.s32 %r9, %r1, -1;",
        "setp.lt.u32 %p1, %r1, 16;\n@%p1 elect.sync %r9|%p2, -1;",
    ],
)
def test_parts_of_a_warp_are_refused(run: Run, text: str) -> None:
    with pytest.raises(PtxError, match="whole warps"):
        run(text, {"%r1": range(32)})


@pytest.mark.parametrize("opcode", ["vote.sync.ballot.b32"])
def test_ballot(run: Run, opcode: str) -> None:
    """The result has a bit for each lane, which is zero for lanes that do not take part."""
    votes = (VALUES >> 7 & 1).astype(bool)
    here = np.arange(THREADS) % 32 < 20
    machine = run(f"{opcode} %r9, %p1, -1;\n@%p2 {opcode} %r8, %p1, -1;", {"%p1": votes, "%p2": here})
    for name, bits in (("%r9", votes), ("%r8", votes & here)):
        expected = [sum(int(bits[warp + lane]) << lane for lane in range(32)) for warp in (0, 32)]
        assert machine.registers[name][here].tolist() == [expected[0]] * 20 + [expected[1]] * 20


@pytest.mark.parametrize("opcode", ["elect.sync"])
def test_elect(run: Run, opcode: str) -> None:
    """One lane of each warp is chosen, and all lanes of the warp are told which."""
    machine = run(f"{opcode} %r9|%p9, -1;\n{opcode} _|%p8, -1;", {"%r1": range(THREADS)})
    for name in ("%p9", "%p8"):
        chosen = machine.registers[name].reshape(2, 32)
        assert chosen.sum(axis=1).tolist() == [1, 1]
    leaders = machine.registers["%p9"].reshape(2, 32).argmax(axis=1)
    assert np.array_equal(machine.registers["%r9"].reshape(2, 32), np.repeat(leaders[:, None], 32, axis=1))
