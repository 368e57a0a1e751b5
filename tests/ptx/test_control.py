"""Tests of predicates, branches and barriers, and that a register is refused that is read before it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.ptx.memory import PtxError

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("guard", "expected"), [("@%p1", [7, 2, 7, 4]), ("@!%p1", [1, 7, 3, 7])], ids=["true", "false"]
)
def test_a_predicate_chooses_threads(run: Run, guard: str, expected: list[int]) -> None:
    machine = run(f"{guard} mov.b32 %r1, 7;", {"%r1": [1, 2, 3, 4], "%p1": [True, False, True, False]})
    assert machine.registers["%r1"].tolist() == expected


@pytest.mark.parametrize("opcode", ["bra", "bra.uni"])
def test_a_loop_of_all_threads(run: Run, opcode: str) -> None:
    text = f"""
    mov.b32 %r1, 0;
    $L__BB0_1:
    add.s32 %r1, %r1, 3;
    setp.lt.s32 %p1, %r1, 10;
    @%p1 {opcode} $L__BB0_1;
    {opcode} $L__BB0_3;
    mov.b32 %r1, 77;
    $L__BB0_3:
    add.s32 %r1, %r1, 100;
    """
    assert run(text).registers["%r1"].tolist() == [112] * 32


@pytest.mark.parametrize("opcode", ["bra"])
def test_threads_part_and_meet(run: Run, opcode: str) -> None:
    """Each thread goes round its own number of times, some threads take another way, and all go on together."""
    text = f"""
    mov.b32 %r2, 0;
    $L__BB0_1:
    add.s32 %r2, %r2, %r1;
    add.s32 %r1, %r1, -1;
    setp.gt.s32 %p1, %r1, 0;
    @%p1 {opcode} $L__BB0_1;
    setp.gt.s32 %p2, %r2, 20;
    @!%p2 {opcode} $L__BB0_2;
    add.s32 %r2, %r2, 1000;
    {opcode} $L__BB0_3;
    $L__BB0_2:
    add.s32 %r2, %r2, 5000;
    $L__BB0_3:
    bar.sync 0;
    add.s32 %r2, %r2, 7;
    """
    sums = [n * (n + 1) // 2 for n in range(1, 33)]
    expected = [total + (1000 if total > 20 else 5000) + 7 for total in sums]
    assert run(text, {"%r1": range(1, 33)}).registers["%r2"].tolist() == expected


@pytest.mark.parametrize("opcode", ["ret"])
def test_threads_that_return_do_nothing_more(run: Run, opcode: str) -> None:
    text = f"@%p1 {opcode};\nadd.s32 %r1, %r1, 10;\n{opcode};\nadd.s32 %r1, %r1, 100;"
    machine = run(text, {"%r1": [1, 2, 3, 4], "%p1": [True, False, False, True]})
    assert machine.registers["%r1"].tolist() == [1, 12, 13, 4]


def test_a_label_belongs_to_its_scope(run: Run) -> None:
    """Inline assembly occurs several times with the same label, which the code around it may have too."""
    block = """
    {
    .reg .pred done;
    .reg .b32 part;
    mov.b32 part, 5;
    setp.eq.b32 done, %r1, 0;
    @done bra AGAIN;
    add.s32 %r1, %r1, part;
    AGAIN:
    add.s32 %r1, %r1, 100;
    }
    """
    around = "bra AGAIN;\nmov.b32 %r1, 7;\nAGAIN:\n"
    assert run(around + block + block, {"%r1": [0, 1, 2]}).registers["%r1"].tolist() == [205, 211, 212]


EXCHANGE = """
shl.b32 %r2, %r1, 2;
st.shared.b32 [%r2], %r1;
BARRIER
xor.b32 %r2, %r2, 128;
ld.shared.b32 %r3, [%r2];
"""


@pytest.mark.parametrize("opcode", ["bar.sync", "barrier.sync"])
@pytest.mark.parametrize("count", ["", ", 64"], ids=["all", "64"])
def test_two_warps_meet_at_a_barrier(run: Run, opcode: str, count: str) -> None:
    machine = run(EXCHANGE.replace("BARRIER", f"{opcode} 0{count};"), {"%r1": range(64)}, shared=256)
    assert machine.registers["%r3"].tolist() == [*range(32, 64), *range(32)]


def test_without_it_they_do_not(run: Run) -> None:
    with pytest.raises(PtxError, match="read that another warp wrote"):
        run(EXCHANGE.replace("BARRIER", ""), {"%r1": range(64)}, shared=256)


PARTED = "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L__BB0_1;\n"


@pytest.mark.parametrize(
    "text",
    [
        "bar.sync 1, 32;",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;",
        f"{PARTED}bar.sync 0;\n$L__BB0_1:\nmov.b32 %r2, 0;",
        f"{PARTED}@!%p1 bar.sync 0;\n$L__BB0_1:\nmov.b32 %r2, 0;",
        f"{PARTED}bar.sync 0;\nbra $L__BB0_2;\n$L__BB0_1:\nbar.sync 0;\n$L__BB0_2:\nmov.b32 %r2, 0;",
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 ret;\nbar.sync 0;",
    ],
    ids=["of some threads", "predicated", "parted", "parted and predicated", "at two places", "after a return"],
)
def test_a_barrier_that_not_all_reach(run: Run, text: str) -> None:
    with pytest.raises(PtxError, match="a barrier that some threads do not reach"):
        run(text, {"%r1": range(64)}, shared=256)


def test_a_barrier_that_no_thread_wants(run: Run) -> None:
    """A barrier whose predicate is false in every thread stops none, even while the threads are at different places."""
    text = f"setp.gt.u32 %p2, %r1, 99;\n@%p2 bar.sync 0;\n{PARTED}@%p2 bar.sync 0;\n$L__BB0_1:\nmov.b32 %r2, 1;"
    assert run(text, {"%r1": range(64)}).registers["%r2"].tolist() == [1] * 64


def test_a_register_that_was_never_written(run: Run) -> None:
    with pytest.raises(PtxError, match="%r2 is read before it is written"):
        run("add.s32 %r3, %r1, %r2;", {"%r1": [1]})


@pytest.mark.parametrize("opcode", ["ld.param.b32", "ld.param.b64"])
def test_parameters(run: Run, opcode: str) -> None:
    given: dict[str, tuple[str, Any]] = {"b32": ("%r1", np.int32(-5)), "b64": ("%rd1", np.uint64(1 << 63))}
    register, value = given[opcode[-3:]]
    machine = run(f"{opcode} {register}, [kernel_param_1];", parameters={"kernel_param_1": value})
    assert machine.registers[register].tolist() == [int(value) % (1 << int(opcode[-2:]))] * 32


NOTHING = {
    "fence.proxy.async.shared::cta": "",
    "griddepcontrol.launch_dependents": "",
    "griddepcontrol.wait": "",
    "createpolicy.fractional.L2::evict_first.b64": "%rd1, 1.0",
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": "",
    "tcgen05.wait::ld.sync.aligned": "",
    "tcgen05.wait::st.sync.aligned": "",
    "tcgen05.fence::before_thread_sync": "",
    "tcgen05.fence::after_thread_sync": "",
}


@pytest.mark.parametrize("opcode", NOTHING)
def test_what_only_orders_or_advises_changes_nothing(run: Run, opcode: str) -> None:
    machine = run(f"{opcode} {NOTHING[opcode]};", {"%r1": range(32)}, shared=64)
    assert {name: values.tolist() for name, values in machine.registers.items()} == {"%r1": list(range(32))}
    assert (machine.shared.data == 0xFF).all()
