"""Makes the input of the C++ test programs of the native experts, and says what those tests need of the machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.experts import inputs, judge, make_weights, route

from k26_plugins.common.experts.native.build import COMPILERS, BuildError, library, variants

SOURCES = Path(__file__).parent / "native"
COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
# HIDDEN has 17 groups of 32 inputs: several tokens pass over two groups at once, so that the last group is left over.
TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 23, 2, 4, 544, 96
# TSan's shadow memory leaves no room for the addresses that newer kernels choose at random.
FIXED_ADDRESSES = ("setarch", "-R") if shutil.which("setarch") else ()

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=f"no C++ compiler ({', '.join(COMPILERS)})")
needs_set = pytest.mark.skipif(not variants(), reason="this CPU has no instruction set of the native experts")


def usable_variants() -> list[str]:
    """Return the native experts' instruction sets that this CPU has, best first, without AMX if the system refuses
    it."""
    found = variants()
    if "amx" in found:
        try:
            library("amx")
        except BuildError:
            found.remove("amx")
    return found


class Sample(NamedTuple):
    """A file with the weights and the batch that a test program reads, and the judge's float64 result."""

    given: Path
    expected: torch.Tensor


def make_sample(folder: Path) -> Sample:
    """Write a layer and a batch with values for which instruction sets could differ in rounding or the exponential."""
    weights = make_weights(EXPERTS, HIDDEN, INNER)
    ids, topk_weights = route(TOKENS, TOP_K, EXPERTS)
    ids[:, 0], ids[:, 1] = 0, ids[:, 1].clamp(min=1)  # expert 0 gets more tokens than a tile of AMX holds
    ids[9, 1] = -1
    x = inputs(TOKENS, HIDDEN)
    x[3], x[4], x[5] = x[3] * 1e-20, x[4] * 3e4, 0
    given = folder / "given"
    tensors = (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale, x, ids, topk_weights)
    sizes = torch.tensor([EXPERTS, HIDDEN, INNER, TOKENS, TOP_K])
    given.write_bytes(b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in (sizes, *tensors)))
    return Sample(given, judge(weights, x, ids, topk_weights))
