"""Tests of loads, stores, atomics and asynchronous copies, and of the mistakes in them that the interpreter has to
notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.ptx.memory import PtxError

Run = Callable[..., Any]
REGISTER = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}
WIDTHS = [*(f"{vector}b{bits}" for vector in ("", "v2.") for bits in (8, 16, 32, 64)), "v4.b8", "v4.b16", "v4.b32"]
THREADS = 64
GENERATOR = np.random.default_rng(0)


def registers_of(width: str) -> tuple[int, list[str], str]:
    """Return the bytes of an element, the registers' names, and how the instruction names them."""
    count, bits = int(width[1]) if width[0] == "v" else 1, int(width.rpartition("b")[2])
    names = [f"{REGISTER[bits]}{10 + index}" for index in range(count)]
    return bits // 8, names, f"{{{', '.join(names)}}}" if count > 1 else names[0]


def scattered(step: int) -> np.ndarray[Any, Any]:
    """Return an address for each thread, in no order; each warp has a range of its own."""
    return np.concatenate([32 * warp + GENERATOR.permutation(32) for warp in range(THREADS // 32)]) * step


@pytest.mark.parametrize("opcode", [f"ld.{space}.{width}" for space in ("global", "shared") for width in WIDTHS])
def test_loads(run: Run, opcode: str) -> None:
    """A narrow value is extended by zeros; threads that are predicated off keep what they have."""
    _, space, width = opcode.split(".", 2)
    size, names, operand = registers_of(width)
    step = size * len(names)
    tensor = torch.from_numpy(GENERATOR.integers(0, 256, 16 + THREADS * step, dtype=np.uint8))
    given: dict[str, Any] = {name: [3] * THREADS for name in names} | {"%p1": np.arange(THREADS) % 3 > 0}
    at = scattered(step)
    if space == "global":
        given["%rd1"] = tensor.data_ptr() + at
        machine = run(f"@%p1 {opcode} {operand}, [%rd1+16];", given, tensors=[tensor])
    else:
        given["%r1"] = at
        machine = run(f"@%p1 {opcode} {operand}, [%r1+16];", given, shared=tensor.numpy())
    data = tensor.numpy()
    for index, name in enumerate(names):
        loaded = [
            int.from_bytes(data[16 + place + index * size :][:size].tobytes(), "little") if taken else 3
            for place, taken in zip(at.tolist(), given["%p1"], strict=True)
        ]
        assert machine.registers[name].tolist() == loaded


SPACES = ("global", "shared", "shared::cta")


@pytest.mark.parametrize("opcode", [f"st.{space}.{width}" for space in SPACES for width in WIDTHS])
def test_stores(run: Run, opcode: str) -> None:
    """The lowest bytes of a wider register are stored, and the first of several registers at the lowest address."""
    _, space, width = opcode.split(".", 2)
    size, names, operand = registers_of(width)
    step, taken, at = size * len(names), np.arange(THREADS) % 3 > 0, scattered(size * len(names))
    values = {name: GENERATOR.integers(0, 1 << 16, THREADS) for name in names}
    given: dict[str, Any] = values | {"%p1": taken}
    expected = np.full(16 + THREADS * step, 0xFF, np.uint8)
    for thread in np.flatnonzero(taken):
        for index, name in enumerate(names):
            number = int(values[name][thread]) % (1 << 8 * size)
            place = 16 + at[thread] + index * size
            expected[place : place + size] = list(number.to_bytes(size, "little"))
    if space == "global":
        tensor = torch.full((len(expected),), 0xFF, dtype=torch.uint8)
        run(f"@%p1 {opcode} [%rd1+16], {operand};", given | {"%rd1": tensor.data_ptr() + at}, tensors=[tensor])
        assert np.array_equal(tensor.numpy(), expected)
    else:
        machine = run(f"@%p1 {opcode} [%r1+16], {operand};", given | {"%r1": at}, shared=len(expected))
        assert np.array_equal(machine.shared.data, expected)


ATOMICS = ["atom.shared.add.u32", "atom.relaxed.sys.shared.add.u32"]


@pytest.mark.parametrize("opcode", ATOMICS)
def test_atomics(run: Run, opcode: str) -> None:
    """Every thread adds its number to one of two counters and gets the counter's value from before, so that each
    partial sum occurs once."""
    text = f"""
    setp.lt.u32 %p1, %r1, 2;
    shl.b32 %r3, %r1, 2;
    mov.b32 %r2, 0xFFFFFFF0;
    @%p1 st.shared.b32 [%r3], %r2;
    bar.sync 0;
    and.b32 %r4, %r1, 1;
    shl.b32 %r4, %r4, 2;
    {opcode} %r5, [%r4], %r1;
    bar.sync 0;
    """
    machine = run(text, {"%r1": range(THREADS)}, shared=8)
    counters = machine.shared.data.view(np.uint32)
    for number in (0, 1):
        added = range(number, THREADS, 2)
        assert counters[number] == (0xFFFFFFF0 + sum(added)) % (1 << 32)
        old = machine.registers["%r5"][number::2].tolist()
        after = [(before + amount) % (1 << 32) for before, amount in zip(old, added, strict=True)]
        # Each value that a thread found is what another left behind, in any order; adding zero leaves what was found.
        assert sorted([0xFFFFFFF0, *after]) == sorted([*old, int(counters[number])])


GROUPS = """
shl.b32 %r2, %r1, 4;
COPY [%r2], [%rd1], 16REST;
cp.async.commit_group;
COPY [%r2+512], [%rd1+512], 16REST;
cp.async.commit_group;
WAIT
ld.shared.b32 %r3, [%r2];
ld.shared.b32 %r4, [%r2+512];
"""
COPIES = {
    "cp.async.cg.shared.global": "",
    "cp.async.ca.shared.global": "",
    "cp.async.cg.shared.global.L2::cache_hint": ", %rd2",
}


@pytest.mark.parametrize(
    ("opcode", "left"),
    [(opcode, left) for opcode in (*COPIES, "cp.async.commit_group") for left in (None, 2, 1, 0)]
    + [("cp.async.wait_group", left) for left in (2, 1, 0)],
)
def test_groups_of_copies(run: Run, opcode: str, left: int | None) -> None:
    """After a wait the oldest groups have arrived and the later ones have not, because a copy may take as long as it
    likes."""
    tensor = torch.arange(256, dtype=torch.int32)
    copy = opcode if opcode in COPIES else next(iter(COPIES))
    text = GROUPS.replace("COPY", copy).replace("REST", COPIES[copy])
    text = text.replace("WAIT", "" if left is None else f"cp.async.wait_group {left};")
    given = {"%r1": range(32), "%rd1": tensor.data_ptr() + np.arange(32) * 16, "%rd2": [0] * 32}
    machine = run(text, given, tensors=[tensor], shared=1024)
    arrived = 0 if left is None else 2 - left
    for group, name in enumerate(("%r3", "%r4")):
        there = (np.arange(32) * 4 + group * 128).tolist()
        assert machine.registers[name].tolist() == (there if group < arrived else [0xFFFFFFFF] * 32)


@pytest.mark.parametrize("opcode", ["cp.async.commit_group", "cp.async.wait_group"])
@pytest.mark.parametrize(
    ("wait", "first", "second"),
    [
        ("cp.async.wait_group 1;", range(16), []),
        ("@%p1 cp.async.wait_group 0;", range(16), range(16)),
        ("cp.async.wait_group 0;", range(32), range(32)),
    ],
)
def test_groups_are_each_threads_own(run: Run, opcode: str, wait: str, first: range, second: range) -> None:
    """One half of the threads closes a group after the first copy, the other half only after both. Only the parts of
    threads whose group was waited for have arrived."""
    text = GROUPS.replace("COPY", "cp.async.ca.shared.global").replace("REST", "").replace("WAIT", wait)
    text = text.replace("cp.async.commit_group;", "@%p1 cp.async.commit_group;", 1)
    assert opcode in text
    tensor = torch.arange(256, dtype=torch.int32)
    given = {"%r1": range(32), "%rd1": tensor.data_ptr() + np.arange(32) * 16, "%p1": [True] * 16 + [False] * 16}
    machine = run(text, given, tensors=[tensor], shared=1024)
    for start, name, there in ((0, "%r3", first), (128, "%r4", second)):
        expected = [start + thread * 4 if thread in there else 0xFFFFFFFF for thread in range(32)]
        assert machine.registers[name].tolist() == expected


@pytest.mark.parametrize("opcode", COPIES)
def test_a_copy_of_nothing_writes_zeros(run: Run, opcode: str) -> None:
    """The fourth operand is the number of bytes that are read. The other bytes become zero, and nothing is read in
    their place."""
    tensor = torch.full((64,), 9, dtype=torch.int32)
    text = f"{opcode} [%r1], [%rd1], 16, %r2{COPIES[opcode]};\ncp.async.commit_group;\ncp.async.wait_group 0;"
    given = {"%r1": np.arange(32) * 16, "%r2": [16] * 16 + [0] * 16, "%rd1": tensor.data_ptr() + np.arange(32) * 16}
    machine = run(text, given | {"%rd2": [0] * 32}, tensors=[tensor], shared=512)
    assert machine.shared.data.view(np.int32).tolist() == [9] * 64 + [0] * 64


@pytest.mark.parametrize("opcode", ["cp.async.ca.shared.global"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_sizes_of_copies(run: Run, opcode: str, size: int) -> None:
    tensor = torch.arange(128, dtype=torch.int32)
    text = f"@%p1 {opcode} [%r1], [%rd1], {size};\ncp.async.commit_group;\ncp.async.wait_group 0;"
    at = np.arange(32) * size
    given = {"%r1": at, "%rd1": tensor.data_ptr() + at, "%p1": [True] * 16 + [False] * 16}
    machine = run(text, given, tensors=[tensor], shared=32 * size)
    half = 16 * size
    assert machine.shared.data.tolist() == tensor.numpy().view(np.uint8)[:half].tolist() + [0xFF] * half


TWO_WARPS = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\nmov.b32 %r2, 0;\nmov.b32 %r3, 5;\n"
WRONG = {
    "is not aligned": [
        "ld.global.b32 %r9, [%rd1+2];",
        "st.global.v2.b32 [%rd1+4], {%r3, %r3};",
        "ld.shared.b64 %rd9, [%r2+4];",
        "st.shared.v4.b32 [%r2+8], {%r3, %r3, %r3, %r3};",
        "cp.async.cg.shared.global [%r2], [%rd1+8], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;",
    ],
    "outside every tensor": [
        "ld.global.b32 %r9, [%rd1+64];",
        "st.global.b32 [%rd1+64], %r3;",
        "st.global.b32 [%rd1+-4], %r3;",
        "cp.async.ca.shared.global [%r2], [%rd1+64], 4;\ncp.async.commit_group;\ncp.async.wait_group 0;",
    ],
    "shared memory has 64 bytes": [
        "ld.shared.b32 %r9, [%r2+64];",
        "st.shared.b32 [%r2+-4], %r3;",
        "cp.async.ca.shared.global [%r2+64], [%rd1], 4;",
    ],
    "read that another warp wrote": [
        "@%p1 st.shared.b32 [%r2], %r3;\n@!%p1 ld.shared.b32 %r9, [%r2];",
        "@%p1 atom.shared.add.u32 %r9, [%r2], 1;\n@!%p1 ld.shared.b32 %r9, [%r2];",
        "@%p1 cp.async.ca.shared.global [%r2], [%rd1], 4;\n@!%p1 ld.shared.b32 %r9, [%r2];",
    ],
    "written that another warp read": [
        "@%p1 ld.shared.b32 %r9, [%r2];\n@!%p1 st.shared.b32 [%r2], %r3;",
        "ld.shared.b32 %r9, [%r2];\n@%p1 st.shared.b32 [%r2], %r3;",
        "@%p1 ld.shared.b32 %r9, [%r2];\n@!%p1 ld.shared.b32 %r9, [%r2];\n@!%p1 st.shared.b32 [%r2], %r3;",
        "@%p1 ld.shared.b32 %r9, [%r2];\n@!%p1 atom.shared.add.u32 %r9, [%r2], 1;",
        "@%p1 ld.shared.b32 %r9, [%r2];\n@!%p1 cp.async.ca.shared.global [%r2], [%rd1], 4;",
    ],
    "two warps write": [
        "@%p1 st.shared.b32 [%r2], %r3;\n@!%p1 st.shared.b32 [%r2], %r3;",
        "@%p1 st.shared.b32 [%r2], %r3;\n@!%p1 atom.shared.add.u32 %r9, [%r2], 1;",
        "@%p1 atom.shared.add.u32 %r9, [%r2], 1;\n@!%p1 st.shared.b32 [%r2], %r3;",
    ],
    "write different values": ["st.shared.b32 [%r2], %r1;", "st.global.b32 [%rd1], %r1;"],
    "whole copies only": [
        "cp.async.ca.shared.global [%r2], [%rd1], 4, 2;\ncp.async.commit_group;\ncp.async.wait_group 0;"
    ],
}


@pytest.mark.parametrize(
    ("reason", "text"),
    [pytest.param(reason, text, id=f"{reason} {n}") for reason, texts in WRONG.items() for n, text in enumerate(texts)],
)
def test_what_is_wrong_is_noticed(run: Run, reason: str, text: str) -> None:
    """Each program has one mistake, such as an access outside its 64 bytes of a tensor or of shared memory, or two
    warps at one address without a barrier between them. The interpreter refuses each."""
    # The tensor's address itself is aligned, because torch aligns to 64 bytes.
    tensor = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(PtxError, match=reason):
        run(TWO_WARPS + text, {"%rd1": [tensor.data_ptr()] * 64, "%r9": [0] * 64}, tensors=[tensor], shared=64)


@pytest.mark.parametrize(
    ("text", "stride", "conflicts"),
    [
        ("ld.shared.b32 %r9, [%r1];", 4, 0),
        ("ld.shared.b32 %r9, [%r1];", 0, 0),
        ("ld.shared.b32 %r9, [%r1];", 8, 1),
        ("ld.shared.b32 %r9, [%r1];", 128, 31),
        ("ld.shared.b32 %r9, [%r1];", 132, 0),
        ("ld.shared.v4.b32 {%r9, %r8, %r7, %r6}, [%r1];", 16, 0),
        ("ld.shared.v4.b32 {%r9, %r8, %r7, %r6}, [%r1];", 128, 28),
        ("st.shared.b64 [%r1], %rd1;", 8, 0),
        ("st.shared.b64 [%r1], %rd1;", 256, 30),
    ],
)
def test_bank_conflicts(run: Run, text: str, stride: int, conflicts: int) -> None:
    """Shared memory has 32 banks of 4 bytes. Accesses of 8 and 16 bytes a lane go half and a quarter of a warp at a
    time."""
    machine = run(text, {"%r1": np.arange(32) * stride, "%rd1": [0] * 32}, shared=32 * 256)
    assert machine.shared.conflicts == conflicts


def test_each_quarter_of_a_warp_has_conflicts_of_its_own(run: Run) -> None:
    """Each quarter of the warp reads half of the banks twice. It does not help that the next quarter reads the other
    half."""
    quarter, lane = np.divmod(np.arange(32), 8)
    at = quarter * 256 + lane * 32 + quarter % 2 * 16
    machine = run("ld.shared.v4.b32 {%r9, %r8, %r7, %r6}, [%r1];", {"%r1": at}, shared=1024)
    assert machine.shared.conflicts == 4
