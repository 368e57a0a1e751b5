"""Tests that every instruction in the interpreter's tables has a test, and that the interpreter refuses all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ptx.machine import JUMPS
from support.ptx.memory import PtxError
from support.ptx.operations import OPERATIONS


class Collected:
    """A plugin of pytest that collects the instructions by which tests are parametrized; the fixture `run` asserts that
    each test runs its own."""

    def __init__(self) -> None:
        self.opcodes: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        specs = (getattr(item, "callspec", None) for item in items if "run" in item.fixturenames)
        self.opcodes |= {spec.params["opcode"] for spec in specs if spec and "opcode" in spec.params}


def test_each_is_tested() -> None:
    """The test collects the whole folder by itself, whatever tests were selected for this run."""
    tested = Collected()
    # The file with the test itself has no instruction of its own.
    others = sorted(str(file) for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__))
    assert pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", *others], plugins=[tested]) == 0
    assert set(OPERATIONS) | set(JUMPS) == tested.opcodes


@pytest.mark.parametrize(
    "unknown",
    [
        "add.sat.s32 %r1, %r2, %r3;",
        "mul.hi.s64 %rd1, %rd2, %rd3;",
        "cvt.rz.bf16.f32 %rs1, %r2;",
        "cvt.sat.s8.s32 %r1, %r2;",
        "setp.ltu.f32 %p1, %r2, %r3;",
        "min.NaN.f32 %r1, %r2, %r3;",
        "ld.global.s8 %r1, [%rd2];",
        "prmt.b32.f4e %r1, %r2, %r3, %r4;",
        "bar.arrive 0;",
        "exit;",
    ],
)
def test_a_modifier_that_is_not_known_is_refused(run: Callable[..., Any], unknown: str) -> None:
    with pytest.raises(PtxError, match="does not know") as refusal:
        run(unknown)
    assert unknown.rstrip(";") in str(refusal.value)
