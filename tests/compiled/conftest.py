"""Fixtures for tests of the compiled kernels, which need Triton without its interpreter, in a process of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import triton
from k26_kernels.target import TARGETS, Device
from k26_kernels.unpack import INTERPRETED
from support.ptx.launch import Emulated

if INTERPRETED.value:
    raise pytest.UsageError("Triton's interpreter is on: run tests/compiled in a process of its own.")

# The module in which each kernel is looked up when it is launched.
experts, align, dequantize = map(import_module, ("k26_kernels.experts", "k26_kernels.align", "bench.dequantize"))
KERNELS = {
    "align_kernel": align,
    "count_kernel": align,
    "place_kernel": align,
    "silu_and_mul_kernel": experts,
    "reduce_kernel": experts,
    "moe_gemm_kernel": experts,
    "dequantize_kernel": dequantize,
}
ORIGINAL = {name: getattr(module, name) for name, module in KERNELS.items()}
# CI runs all tests for sm_90, whose matrix instructions are asynchronous. For the other targets it runs only the tests
# of what differs by target, under the newest Triton.
IN_CI = "sm_90"
DIFFERS = ("test_dequantize", "test_every_config[sm_80-32]", "test_every_config[sm_100-32]",
           "test_every_config[sm_120-32]", "test_the_other_members_of_a_family[121-sm_120]")  # fmt: skip
NEWEST = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
FEW_SMS = 4  # so that programs walk over several tiles


@cache
def emulated(name: str, capability: int) -> Emulated:
    """Return a kernel compiled for a capability. All tests share it, so that it is compiled once."""
    return Emulated(ORIGINAL[name], capability)


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Emulated]]]:
    """Yield a function: `compiled_for("sm_90")` makes the kernels run here as compiled for that GPU, and returns them
    by name."""

    def use(
        target: str, *, num_sms: int = FEW_SMS, capability: int = 0, edit: Callable[[str], str] | None = None
    ) -> dict[str, Emulated]:
        device = Device(TARGETS[target], f"emulated {target}", num_sms)
        monkeypatch.setattr(experts, "device_of", lambda _: device)
        monkeypatch.setattr(dequantize, "device_of", lambda _: device)
        number = capability or int(target[3:])
        kernels: dict[str, Any] = {}
        for name, module in KERNELS.items():
            kernels[name] = emulated(name, number) if edit is None else Emulated(ORIGINAL[name], number, edit)
            monkeypatch.setattr(module, name, kernels[name])
        return kernels

    yield use
    experts.make_plan.cache_clear()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        target = getattr(item, "callspec", None) and item.callspec.params.get("target")  # type: ignore[attr-defined]
        of_a_run = "test_runs" in item.nodeid and target not in (None, IN_CI)
        if of_a_run and not (NEWEST and item.name.startswith(DIFFERS)):
            item.add_marker(pytest.mark.long)
