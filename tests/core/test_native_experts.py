"""Tests of the native experts' results beyond those of every backend: on each instruction set, with any threads, and
for submitted work. The judge is the float64 product of support/experts.py."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from support.experts import error, inputs, judge, make_weights, route
from support.instruction_sets import INSTRUCTION_SET
from support.native_experts import REASON, load, needs_amx, needs_native
from support.native_sample import usable_variants

from k26_plugins.common.experts import ExpertsError, reference_experts
from k26_plugins.common.experts.native import backend
from k26_plugins.common.experts.native.build import VARIANTS, library
from k26_plugins.common.experts.native.threads import Threads
from k26_plugins.common.host.cores import Core

# The goal is 4e-3. The computation's own error is 3e-5; rounding the result to bfloat16 makes it 1.7e-3.
TOLERANCE, FLOAT_TOLERANCE = 2.5e-3, 1e-4
PARTS = [(0, 1), (1, 3), (3, 6), (6, 23)]
SHAPES = [
    (1, 2, 8, 128, 64),
    (3, 4, 4, 128, 32),
    (17, 1, 8, 192, 96),
    (130, 2, 3, 128, 64),
    (1, 8, 8, 2048, 512),
    (9, 2, 3, 544, 64),
    (77, 1, 1, 2048, 32),  # computed in tiles, with the inputs in two parts
]


def each_variant() -> list[object]:
    """Return the library's instruction sets as parameters of a test; a set that this CPU lacks is skipped with that
    reason."""
    usable = [] if REASON else usable_variants()
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in usable, reason=REASON or f"this CPU has no {name}"))
        for name in VARIANTS
    ]


def use(monkeypatch: pytest.MonkeyPatch, threads: Threads) -> None:
    monkeypatch.setattr(backend, "process_threads", lambda: threads)


@pytest.mark.parametrize("variant", each_variant())
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts", "hidden", "inner"), SHAPES, ids=str)
def test_instruction_sets(
    variant: str,
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden: int,
    inner: int,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, str], None],
) -> None:
    threads = Threads(library(variant))
    use(monkeypatch, threads)
    weights = make_weights(num_experts, hidden, inner)
    ids, topk_weights = route(num_tokens, top_k, num_experts)
    x = inputs(num_tokens, hidden)
    expected = judge(weights, x, ids, topk_weights)
    reference = reference_experts(x.double(), ids, topk_weights, weights.expert, num_experts)
    assert error(reference, expected) <= 1e-12
    experts = load(weights)
    assert error(experts.apply(x, ids, topk_weights), expected) <= TOLERANCE
    assert error(experts.apply(x.float(), ids, topk_weights), expected) <= FLOAT_TOLERANCE
    assert error(experts.apply(x.half(), ids, topk_weights), expected) <= TOLERANCE
    record_property(INSTRUCTION_SET, f"native {threads.instruction_set}")


def repacked_plainly(packed: torch.Tensor, scale: torch.Tensor, *, gated: bool) -> list[torch.Tensor]:
    """Return the bytes and scales of an expert's projection as `kernel.hpp` describes them, row by row and word by
    word."""
    rows, words = packed.shape
    inner = rows // 2
    # Two tiles of the gate projection come first, then the same two of the up projection.
    firsts = [at for pair in range(0, inner, 32) for at in (pair, pair + 16, inner + pair, inner + pair + 16)]
    tiles = firsts if gated else range(0, rows, 16)
    u = unpack_from_int32(packed, 4, torch.Size((rows, 8 * words))).to(torch.int32) + 8
    lanes = [u[first + row, 8 * word :][:8] for first in tiles for word in range(words) for row in range(16)]
    scales = [scale[first + row, group] for first in tiles for group in range(words // 4) for row in range(16)]
    return [torch.cat([lane[:4] + 16 * lane[4:] for lane in lanes]).to(torch.uint8), torch.stack(scales)]


@pytest.mark.parametrize("variant", each_variant())
def test_repacked_bytes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repacked bytes are the same on every instruction set and with any number of threads, even if the length of a
    tile is no multiple of a vector's."""
    weights = make_weights(2, 96, 160)
    w13 = [repacked_plainly(weights.w13_packed[i], weights.w13_scale[i], gated=True) for i in range(2)]
    w2 = [repacked_plainly(weights.w2_packed[i], weights.w2_scale[i], gated=False) for i in range(2)]
    for team in (1, 3):
        use(monkeypatch, Threads(library(variant), team=team))
        found = load(weights).weights
        for expert in range(2):
            assert torch.equal(found.w13_packed[expert].view(torch.uint8).flatten(), w13[expert][0])
            assert torch.equal(found.w13_scale[expert].flatten(), w13[expert][1])
            assert torch.equal(found.w2_packed[expert].view(torch.uint8).flatten(), w2[expert][0])
            assert torch.equal(found.w2_scale[expert].flatten(), w2[expert][1])


@needs_native
def test_same_bits_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are computed alone and in groups, with values at which rounding or the exponential could differ."""
    weights = make_weights(4, 544, 96)
    ids, topk_weights = route(23, 2, 4)
    x = inputs(23, 544)
    x[3], x[4], x[5] = x[3] * 1e-20, x[4] * 3e4, 0
    x[6, 5] = float("inf")
    results = []
    for name in usable_variants():
        use(monkeypatch, Threads(library(name)))
        experts = load(weights)
        results.append(torch.cat([experts.apply(x[i:j].float(), ids[i:j], topk_weights[i:j]) for i, j in PARTS]))
    assert results[0][[*range(6), *range(7, 23)]].isfinite().all()
    assert all(torch.equal(result.view(torch.int32), results[0].view(torch.int32)) for result in results)


@needs_native
def test_same_bits_with_any_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are the same with torch's threads and with the library's own, with one to three threads, on one NUMA
    node and on two, in two runs of each."""
    weights = make_weights(6, 192, 160)
    ids, topk_weights = route(90, 3, 6)
    ids[5:20, 1] = -1
    x = inputs(90, 192)
    cpu = min(os.sched_getaffinity(0))
    teams = [Threads(library(), team=count) for count in (1, 2, 3)]
    one_node = [Threads(library(), pool=[Core(0, cpu)] * count, team=0) for count in (1, 2, 3)]
    two_nodes = Threads(library(), pool=[Core(0, cpu), Core(0, cpu), Core(1, cpu)], team=0)
    results = []
    for threads in [*teams, *one_node, two_nodes]:
        use(monkeypatch, threads)
        experts = load(weights)
        results += [experts.apply(x, ids, topk_weights) for _ in range(2)]
    assert error(results[0], judge(weights, x, ids, topk_weights)) <= TOLERANCE
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
def test_a_token_does_not_depend_on_its_batch() -> None:
    """A token's result is the same alone and in a batch that spans several of the blocks of tokens, and of the groups
    of inputs, that are computed at a time."""
    weights = make_weights(4, 544, 32)
    experts = load(weights)
    ids, topk_weights = route(1100, 2, 4)
    x = inputs(1100, 544)
    together = experts.apply(x, ids, topk_weights)
    for part in (slice(0, 1), slice(1000, 1030), slice(1099, 1100)):
        assert torch.equal(experts.apply(x[part], ids[part], topk_weights[part]), together[part])


@needs_native
def test_submitted_work() -> None:
    """Several calls are submitted at once and waited for in another order or not at all, while their arguments are
    dropped. Each gives what `apply` gives."""
    weights = make_weights(4, 128, 64)
    experts = load(weights)
    ids, topk_weights = route(40, 2, 4)
    x = inputs(40, 128)
    expected = experts.apply(x, ids, topk_weights)
    waiting = [experts.submit(x.clone(), ids.clone(), topk_weights.clone()) for _ in range(5)]
    del waiting[1]
    assert torch.equal(experts.apply(x, ids, topk_weights), expected)
    assert all(torch.equal(wait(), expected) for wait in reversed(waiting))
    strided = torch.empty(40, 256, dtype=torch.bfloat16)[:, ::2]
    assert experts.submit(x, ids, topk_weights, out=strided)() is strided
    assert torch.equal(strided, expected)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_result_in_a_dtype_that_the_library_does_not_write(dtype: torch.dtype) -> None:
    """The result is the float32 result converted, in the very tensor that the caller gave."""
    experts = load(make_weights(4, 128, 64))
    batch = (inputs(5, 128), *route(5, 2, 4))
    single = experts.apply(*batch, out=torch.empty(5, 128))
    given = torch.empty(5, 128, dtype=dtype)
    assert experts.apply(*batch, out=given) is given
    assert torch.equal(given, single.to(dtype))
    assert torch.equal(experts.submit(*batch, out=torch.empty_like(given))(), given)


@needs_native
def test_what_is_not_finite_stays_so() -> None:
    weights = make_weights(2, 128, 64)
    experts = load(weights)
    x = inputs(3, 128)
    x[1, 7] = float("nan")
    x[2, 7] = float("inf")
    result = experts.apply(x, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
    assert result[0].isfinite().all()
    assert not result[1].isfinite().any()
    assert not result[2].isfinite().any()
    assert not experts.apply(torch.zeros(1, 128), torch.zeros(1, 1), torch.ones(1, 1)).any()


@needs_native
def test_arguments_that_are_refused() -> None:
    experts = load(make_weights(2, 128, 64))
    x, ones = inputs(2, 128), torch.ones(2, 1)
    nobody = torch.full((2, 1), -1)
    with pytest.raises(ExpertsError, match=r"hidden_states has shape \[2, 64\]"):
        experts.apply(inputs(2, 64), nobody, ones)
    with pytest.raises(ExpertsError, match=r"topk_weights has shape \[1, 1\]"):
        experts.apply(x, nobody, ones[:1])
    with pytest.raises(ExpertsError, match=r"out has shape \[1, 128\]"):
        experts.apply(x, nobody, ones, out=torch.empty(1, 128))


@needs_native
@needs_amx
def test_amx_beside_torchs_own() -> None:
    """torch's bfloat16 product uses AMX's registers on the same threads in other shapes, and neither product disturbs
    the other."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 512).bfloat16(), torch.randn(512, 256).bfloat16()
    experts = load(make_weights(4, 128, 64))
    ids, topk_weights = route(90, 2, 4)
    x = inputs(90, 128)
    product, expected = a @ b, experts.apply(x, ids, topk_weights)
    for _ in range(5):
        assert torch.equal(experts.apply(x, ids, topk_weights), expected)
        assert torch.equal(a @ b, product)
    assert error(product, a.double() @ b.double()) <= 1e-2
