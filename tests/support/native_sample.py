"""What the native experts are given as programs of their own, and what these tests need of the machine."""

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
# 17 groups of inputs, the last of them not one of as many as several tokens pass over at once.
TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 23, 2, 4, 544, 96
# TSan's shadow memory leaves no room for the addresses that newer kernels choose at random.
FIXED_ADDRESSES = ("setarch", "-R") if shutil.which("setarch") else ()

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=f"no C++ compiler ({', '.join(COMPILERS)})")
needs_set = pytest.mark.skipif(not variants(), reason="this CPU has no instruction set of the native experts")


def usable_variants() -> list[str]:
    """The instruction sets of the native experts that this CPU has, best first, without AMX where the system refuses it."""
    found = variants()
    if "amx" in found:
        try:
            library("amx")
        except BuildError:
            found.remove("amx")
    return found


class Sample(NamedTuple):
    given: Path
    expected: torch.Tensor


def make_sample(folder: Path) -> Sample:
    """A layer and a batch, with values at which rounding or the exponential of two instruction sets could differ."""
    weights = make_weights(EXPERTS, HIDDEN, INNER)
    ids, topk_weights = route(TOKENS, TOP_K, EXPERTS)
    ids[:, 0], ids[:, 1] = 0, ids[:, 1].clamp(min=1)  # an expert with tokens for a tile of AMX, and more
    ids[9, 1] = -1
    x = inputs(TOKENS, HIDDEN)
    x[3], x[4], x[5] = x[3] * 1e-20, x[4] * 3e4, 0
    given = folder / "given"
    tensors = (weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale, x, ids, topk_weights)
    sizes = torch.tensor([EXPERTS, HIDDEN, INNER, TOKENS, TOP_K])
    given.write_bytes(b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in (sizes, *tensors)))
    return Sample(given, judge(weights, x, ids, topk_weights))
