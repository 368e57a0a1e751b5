"""Without a GPU the kernels run under Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()

if not ON_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("Triton is already imported: run tests/kernels in a process of its own.")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=["sm_90", "sm_80", "sm_100", "gfx942", "gfx950"])
def each_layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a target whose weight layout the test uses.

    Under the interpreter a test runs with the layout of each matrix instruction; on a GPU only with the GPU's own
    layout.
    """
    from k26_kernels import device_of, target

    if ON_GPU:
        if target.TARGETS[request.param].fragment != device_of(torch.device("cuda")).target.fragment:
            pytest.skip("another GPU's layout")
    else:
        fake = target.Device(target.TARGETS[request.param], "interpreter", 4)
        for module in (sys.modules["k26_kernels.experts"], sys.modules["bench.dequantize"]):
            monkeypatch.setattr(module, "device_of", lambda device: fake)
    return str(request.param)
