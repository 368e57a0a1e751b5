"""Tests of tensor memory, of its matrix instruction, and of the barriers that tell when that instruction is done
(`tcgen05`, `mbarrier`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.ptx.memory import PtxError

Run = Callable[..., Any]
THREADS, LANES, COLUMNS = 128, 128, 512
WARP0 = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\nsetp.eq.b32 %p2, %r1, 0;\nmov.b32 %r2, 0;\n"
ALLOC = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32"
DEALLOC = "tcgen05.dealloc.cta_group::1.sync.aligned.b32"
LOAD, STORE = (f"tcgen05.{name}.sync.aligned.32x32b.x1.b32" for name in ("ld", "st"))
ALL = f"{WARP0}@%p1 {ALLOC} [%r2], 512;\n"
# An address has its lane in the upper half: here the first lane of each warp's quarter.
QUARTER = {"%r3": np.arange(THREADS) // 32 * 32 << 16}


def listed(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + index}" for index in range(count)) + "}"


def place_of(shape: str, thread: int, register: int, second: int) -> tuple[int, int]:
    """Return the lane and column of a thread's register, by the ISA's figures."""
    warp, lane = divmod(thread, 32)
    if shape == "32x32b":
        row, column = lane, register
    elif shape == "16x128b":
        row, column = lane // 4 + (8 if register % 2 else 0), lane % 4 + 4 * (register // 2)
    else:
        row, column = lane % 16, register + (second if lane >= 16 else 0)
    return 32 * warp + row, column


SHAPES = [
    f"{shape}.x{1 << n}" for shape, most in (("32x32b", 7), ("16x128b", 6), ("16x32bx2", 7)) for n in range(most + 1)
]


@pytest.mark.parametrize(
    "opcode", [f"tcgen05.{name}.sync.aligned.{shape}.b32" for name in ("st", "ld") for shape in SHAPES]
)
def test_shapes(run: Run, opcode: str) -> None:
    """A store puts each register where the shape says, and a load finds it there."""
    shape, number = opcode.split(".")[4:6]
    count, second = int(number[1:]) * (2 if shape == "16x128b" else 1), 200
    half = f", {second}" if shape == "16x32bx2" else ""
    memory = np.full((LANES, COLUMNS), 0xFFFFFFFF, np.uint32)
    values = np.random.default_rng(0).integers(0, 1 << 32, (count, THREADS), dtype=np.uint32)
    for index in range(count):
        for thread in range(THREADS):
            lane, column = place_of(shape, thread, index, second)
            memory[lane, 32 + column] = values[index, thread]
    if ".st." in opcode:
        registers = QUARTER | {f"%r{10 + index}": values[index] for index in range(count)}
        machine = run(f"{ALL}{opcode} [%r3+32]{half}, {listed(10, count)};", registers, shared=4)
        assert np.array_equal(machine.tensor_memory.data, memory)
    else:
        # The memory is filled column by column in the plainest shape, whose store is tested by this test too.
        fill = [f"{STORE} [%r3+{column}], %r{200 + column};" for column in range(COLUMNS)]
        registers = QUARTER | {f"%r{200 + column}": memory[:, column] for column in range(COLUMNS)}
        machine = run(f"{ALL}{''.join(fill)}\n{opcode} {listed(800, count)}, [%r3+32]{half};", registers, shared=4)
        for index in range(count):
            assert np.array_equal(machine.registers[f"%r{800 + index}"], values[index])


@pytest.mark.parametrize("opcode", [ALLOC, DEALLOC])
def test_allocations(run: Run, opcode: str) -> None:
    """Allocations follow one another, each writes its address to shared memory, and columns that were given back can be
    allocated again."""
    text = f"{WARP0}@%p1 {ALLOC} [%r2], 128;\n@%p1 {ALLOC} [%r2+4], 64;\n"
    machine = run(text, threads=THREADS, shared=8)
    assert machine.shared.data.view(np.uint32).tolist() == [0, 128]
    again = f"@%p1 {DEALLOC} %r2, 64;\n@%p1 {DEALLOC} %r2, 128;\n@%p1 {ALLOC} [%r2], 512;\n"
    machine = run(text + again, threads=THREADS, shared=8)
    assert opcode in text + again
    assert machine.shared.data.view(np.uint32)[0] == 0


BARRIER, MATRIX = 16, 1024
INIT, INVAL = "mbarrier.init.shared::cta.b64", "mbarrier.inval.shared::cta.b64"
WAITS = ["mbarrier.try_wait.parity.shared::cta.b64", "mbarrier.try_wait.parity.shared.b64"]
COMMITS = [f"tcgen05.commit.cta_group::1.mbarrier::arrive::one.{rest}" for rest in ("shared::cluster.b64", "b64")]
MMA = "tcgen05.mma.cta_group::1.kind::f16"


def kind(rows: int, columns: int) -> int:
    """Return the instruction descriptor: float32 at bit 4, bfloat16 at bits 7 and 10, columns / 8 at 17, rows / 16 at
    24."""
    return 1 << 4 | 1 << 7 | 1 << 10 | columns >> 3 << 17 | rows >> 4 << 24


def in_shared_memory(b: torch.Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """Lay out `[n, 16]` in rows of 32 bytes, whose halves change places in the upper four of eight rows; return the
    memory and its descriptor."""
    memory = np.full(MATRIX + len(b) * 32, 0xFF, np.uint8)
    for row, bits in enumerate(b.view(torch.int16).numpy().view(np.uint8).reshape(len(b), 2, 16)):
        for half in (0, 1):
            place = MATRIX + row * 32 + (half ^ row % 8 // 4) * 16
            memory[place : place + 16] = bits[half]
    # Bit 46 is constant in this generation's descriptors, and 6 at bit 61 stands for this swizzle.
    return memory, MATRIX >> 4 | 16 >> 4 << 16 | 256 >> 4 << 32 | 1 << 46 | 6 << 61


def program(
    rows: int, n: int, adds: str, *, wait: str, commit: str = COMMITS[0]
) -> tuple[str, dict[str, Any], Any, torch.Tensor]:
    """Return a program that multiplies tensor memory's `[rows, 16]` by `[n, 16]`: its text, its registers, shared
    memory, and the expected sums."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (size, 16), generator=generator).to(torch.bfloat16) for size in (rows, n))
    memory, descriptor = in_shared_memory(b)
    words = a.view(torch.int16).numpy().view(np.uint32)
    # A matrix of 64 rows has the first 16 of each warp's 32 lanes.
    lanes = [lane for lane in range(LANES) if rows == LANES or lane % 32 < 16]
    registers: dict[str, Any] = dict(QUARTER) | {"%rd1": [descriptor] * THREADS, "%r4": [kind(rows, n)] * THREADS}
    for index in range(8):
        register = np.zeros(THREADS, np.uint32)
        register[lanes] = words[:, index]
        registers[f"%r{10 + index}"] = register
    # Before the product every sum of a lane is the lane's number.
    registers["%r20"] = np.arange(THREADS, dtype=np.float32).view(np.uint32)
    sums = "".join(f"{STORE} [%r3+{64 + column}], %r20;\n" for column in range(n))
    text = f"""{ALL}
    @%p2 {INIT} [%r2+{BARRIER}], 1;
    bar.sync 0;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r3+8], {listed(10, 8)};
    {sums}
    setp.ne.b32 %p3, {adds}, 0;
    @%p2 {MMA} [%r2+64], [%r2+8], %rd1, %r4, %p3;
    @%p2 {commit} [%r2+{BARRIER}];
    {wait}
    """
    product = a.double() @ b.double().T
    expected = torch.arange(THREADS).double()[:, None].repeat(1, n)
    if wait:
        expected[lanes] = product + (expected[lanes] if adds == "1" else 0)
    return text, registers, memory, expected


def loads(n: int) -> str:
    return "\n".join(f"{LOAD} %r{300 + column}, [%r3+{64 + column}];" for column in range(n))


def loaded(machine: Any, n: int) -> torch.Tensor:
    columns = [torch.from_numpy(machine.registers[f"%r{300 + column}"].view(np.float32)) for column in range(n)]
    return torch.stack(columns, dim=1).double()


def waiting(parity: int, opcode: str = WAITS[0]) -> str:
    """Return a wait as the compiler writes it: a loop until the barrier's phase has ended."""
    return f"$L__WAIT{parity}:\n{opcode} %p4, [%r2+{BARRIER}], {parity};\n@!%p4 bra.uni $L__WAIT{parity};"


@pytest.mark.parametrize("opcode", [MMA])
@pytest.mark.parametrize("adds", ["1", "0"], ids=["added", "new"])
@pytest.mark.parametrize(("rows", "n"), [(128, 16), (128, 64), (128, 256), (64, 8), (64, 24)])
def test_products(run: Run, opcode: str, rows: int, n: int, adds: str) -> None:
    text, registers, memory, expected = program(rows, n, adds, wait=waiting(0))
    assert torch.equal(loaded(run(text + loads(n), registers, shared=memory), n), expected)


@pytest.mark.parametrize("opcode", [INIT, *COMMITS])
def test_a_wait_for_a_commit(run: Run, opcode: str) -> None:
    """The product is in tensor memory after the wait, and before the wait it is not."""
    commit = opcode if opcode in COMMITS else COMMITS[0]
    for wait in (waiting(0), ""):
        text, registers, memory, expected = program(128, 16, "0", wait=wait, commit=commit)
        machine = run(text + loads(16), registers, shared=memory)
        assert torch.equal(loaded(machine, 16), expected)


@pytest.mark.parametrize("opcode", WAITS)
def test_phases(run: Run, opcode: str) -> None:
    """The phase before the first has parity 1 and has ended; each commit ends the next."""
    text, registers, memory, expected = program(128, 16, "1", wait=waiting(0, opcode))
    early = text.replace("bar.sync 0;", f"bar.sync 0;\n{opcode} %p5, [%r2+{BARRIER}], 1;", 1)
    again = f"@%p2 {MMA} [%r2+64], [%r2+8], %rd1, %r4, %p3;\n@%p2 {COMMITS[0]} [%r2+{BARRIER}];\n{waiting(1, opcode)}\n"
    machine = run(early + again + loads(16), registers, shared=memory)
    assert machine.registers["%p5"].all()
    once = expected - torch.arange(THREADS).double()[:, None]
    assert torch.equal(loaded(machine, 16), expected + once)


@pytest.mark.parametrize("opcode", [INVAL])
def test_a_barrier_that_is_no_more(run: Run, opcode: str) -> None:
    text, registers, memory, _ = program(128, 16, "1", wait=waiting(0))
    ended = f"@%p2 {opcode} [%r2+{BARRIER}];\n"
    run(text + ended, registers, shared=memory)
    with pytest.raises(PtxError, match="waited for that was not made"):
        run(text + ended + waiting(1), registers, shared=memory)


WRONG = [
    (f"@%p1 {ALLOC} [%r2], 512;\n@%p1 {ALLOC} [%r2], 32;", "544 columns of tensor memory are wanted"),
    (f"@%p1 {ALLOC} [%r2], 32;\n{LOAD} %r5, [%r3+32];", "was not allocated"),
    (f"@%p1 {ALLOC} [%r2], 32;\n@%p1 {DEALLOC} %r2, 32;\n{STORE} [%r3], %r2;", "was not allocated"),
    (f"@%p1 {ALLOC} [%r2], 32;\n{LOAD} %r5, [%r2];", "another's"),
    (f"@%p1 {ALLOC} [%r2], 32;\n@%p1 {LOAD} %r5, [%r3];", "some threads do not reach"),
    (f"@%p1 {ALLOC} [%r1], 32;", "the threads disagree"),
    (f"@%p2 {INIT} [%r2], 2;", "one arrival"),
    (f"@%p2 {INIT} [%r2], 1;\nbar.sync 0;\n{WAITS[0]} %p3, [%r2], 0;", "nothing will ever end this wait"),
    (f"@%p1 bra $L__BB0_1;\n{WAITS[0]} %p3, [%r2], 0;\n$L__BB0_1:\nmov.b32 %r5, 0;", "was not made"),
    (f"@%p2 {MMA} [%r2], [%r2], %rd1, %r2, %p1;", "does not know"),
    (f"mov.b32 %r5, {kind(128, 16)};\n{MMA} [%r2], [%r2], %rd1, %r5, %p1;", "does not know"),
    (f"mov.b32 %r5, {kind(128, 16) | 1 << 16};\n@%p2 {MMA} [%r2], [%r2], %rd1, %r5, %p1;", "does not know"),
]


@pytest.mark.parametrize(("text", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_what_is_wrong_is_noticed(run: Run, text: str, reason: str) -> None:
    with pytest.raises(PtxError, match=reason):
        run(WARP0 + text, QUARTER | {"%rd1": [0] * THREADS}, shared=8)


def test_a_warp_waits_while_another_works(run: Run) -> None:
    """The last warp has all the work; the others are at their wait before it begins."""
    text, registers, memory, expected = program(128, 16, "0", wait=waiting(0))
    text += loads(16)
    first, start, rest = text.partition(f"@%p2 {MMA}")
    work, end, after = (start + rest).partition(waiting(0))
    work = f"setp.lt.u32 %p5, %r1, 96;\nsetp.eq.b32 %p2, %r1, 96;\n@%p5 bra $L__WAIT0;\n{work}"
    machine = run(f"{first}{work}{end}\nbar.sync 0;\n{after}", registers, shared=memory)
    assert torch.equal(loaded(machine, 16), expected)
