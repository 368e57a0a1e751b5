"""Tests of how many programs of a GEMM are launched: as many as the SMs hold, once the compiler's figures are known."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from k26_kernels import KernelExperts, fused_experts
from k26_kernels.experts import PROGRAMS_AT_FIRST
from k26_kernels.target import TARGETS, Device
from support.experts import inputs, make_weights, route

experts = import_module("k26_kernels.experts")

# Target, threads of a program, registers of a thread, bytes of shared memory and columns of tensor memory → programs
# that an SM holds. The comments name what limits the number.
HELD = {
    ("sm_90", 128, 126, 53248, 0): 4,  # registers and shared memory alike
    ("sm_90", 128, 129, 53248, 0): 3,  # registers, which are given out eight at a time
    ("sm_90", 128, 96, 76800, 0): 3,  # shared memory: three times 75 KB and 1 KB
    ("sm_90", 128, 96, 76801, 0): 2,
    ("sm_90", 256, 234, 61440, 0): 1,
    ("sm_90", 256, 255, 232448, 0): 1,
    ("sm_100", 128, 96, 43024, 128): 4,  # tensor memory
    ("sm_100", 128, 96, 43024, 0): 5,
    ("sm_80", 128, 72, 30720, 0): 3,
    ("gfx942", 256, 128, 8192, 0): 4,
    ("gfx942", 256, 100, 32768, 0): 2,
    ("gfx942", 256, 512, 0, 0): 1,
}


@pytest.mark.parametrize("case", HELD, ids=str)
def test_what_an_sm_holds(case: tuple[str, int, int, int, int]) -> None:
    target, *figures = case
    assert Device(TARGETS[target], "the family's smallest", 1).programs_per_sm(*figures) == HELD[case]


def test_a_larger_member_of_a_family_holds_more() -> None:
    """An A100 has more shared memory an SM than an RTX 40, and holds more programs."""
    a100, rtx = (Device(TARGETS["sm_80"], "a GPU", 1, size * 1024) for size in (164, 100))
    assert (a100.programs_per_sm(128, 72, 30720), rtx.programs_per_sm(128, 72, 30720)) == (5, 3)


def test_launches_take_what_the_first_one_compiled(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch of each GEMM guesses its number of programs, later launches use that GEMM's compiled figures,
    and all results have the same bits."""
    if device.type != "cpu":
        pytest.skip("its GPU is the interpreter's, which has four SMs")
    grids: list[int] = []
    threads = SimpleNamespace(warp_size=32)

    class Compiled:
        """The kernel with figures as a GPU's compiler gives them, which the interpreter lacks: two programs of w13 fit
        on an SM, and one of w2."""

        kernel = experts.moe_gemm_kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid[0])

            def launch(*arguments: object, **options: Any) -> object:
                self.kernel[grid](*arguments, **options)
                registers = 256 if options["EPILOGUE"] == "silu_and_mul" else 512
                return SimpleNamespace(
                    n_regs=registers, metadata=SimpleNamespace(num_warps=4, target=threads, shared=49152)
                )

            return launch

    monkeypatch.setattr(experts, "moe_gemm_kernel", Compiled())
    monkeypatch.setattr(experts, "programs_per_sm", {})
    weights = make_weights(3, 768, 384)
    loaded = KernelExperts.from_checkpoint(*(part.to(device) for part in weights.parts()))
    ids, topk_weights = (tensor.to(device) for tensor in route(12, 2, 3))
    x = inputs(12, 768).to(device)
    results = [fused_experts(x, loaded, ids, topk_weights) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])
    num_sms = loaded.device.num_sms
    assert grids[:2] == [PROGRAMS_AT_FIRST * num_sms] * 2
    assert grids[2:] == [2 * num_sms, num_sms] * 2
