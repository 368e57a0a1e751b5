"""Tests of kt-kernel's own RAWINT4 experts, as installed, behind the core's interface, against float64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from engine_names import read_snapshot
from support.experts import error, inputs, judge, make_weights, overwritten_when_let_go, route
from support.instruction_sets import INSTRUCTION_SET
from support.versions import wrong_entries

from k26_plugins.common.adapters.engine import EngineName, UnsupportedEngineError
from k26_plugins.common.experts import ExpertsError, create_experts
from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.deferred import Deferral
from k26_plugins.common.experts.hybrid import HybridExperts
from k26_plugins.common.experts.placement import place
from k26_plugins.common.host.cores import Core
from k26_plugins.common.host.cpu import cpu_flags
from k26_plugins.ktransformers import compat, names
from k26_plugins.ktransformers.experts import KtExperts

# kt-kernel rounds activations to 8 bits.
TOLERANCE = 2e-2

# How older releases fail, and the error with which each is refused. On a CPU without AMX 0.6.1 would end the process
# with an illegal instruction, and 0.6.2.post4, 0.6.4 and 0.7.0 compute garbage; with AMX 0.6.1 and 0.6.4 compute
# garbage. On a CPU without AVX512 releases before 0.7 end the process when they are imported or when they start their
# threads.
GARBAGE = r"it failed the self-test on cpu, relative error 0\.\d+ \(limit 0.03\)"
WITHOUT_AMX = {"0.6.1": "kt-kernel 0.6.1 has no RAWINT4 experts for this CPU", "0.6.4": GARBAGE}
WITH_AMX = {"0.6.1": GARBAGE, "0.6.4": GARBAGE}
refusal = compat.ends_the_process()
if refusal is None and "avx512f" in cpu_flags():
    has_amx = compat.private(names.CPU_VARIANT) == "amx"
    refusal = (WITH_AMX if has_amx else WITHOUT_AMX).get(compat.kt_kernel_version())
runs_here = pytest.mark.skipif(
    refusal is not None, reason=f"kt-kernel {compat.kt_kernel_version()} has no right RAWINT4 for this CPU"
)


@pytest.mark.skipif(refusal is None, reason="this kt-kernel runs on this CPU")
def test_garbage_is_refused() -> None:
    with pytest.raises(ExpertsError, match=f"kt is not, because {refusal}"):
        create_experts(make_weights(8, 256, 128), "kt")


@pytest.mark.skipif(compat.ends_the_process() is not None, reason="this kt-kernel ends the process when it is imported")
@pytest.mark.parametrize("per_token", [1, 3, 8])
def test_experts_are_deferred_as_kt_kernel_defers_them(per_token: int) -> None:
    """Our choice of deferred experts is kt-kernel's. The batch is one token, because in a longer batch kt-kernel keeps
    every expert that any token keeps, so that an answer depends on its neighbours."""
    from kt_kernel.experts_base import BaseMoEWrapper

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(32, generator=generator)[None, :8]
        weights = torch.rand(1, 8, generator=generator)
        expected = BaseMoEWrapper.select_deferred_experts(SimpleNamespace(num_experts=32), ids, weights, 8 - per_token)
        found = Deferral(per_token, last_layer=60).split(1, ids, weights)
        assert [one.tolist() for one in found] == [one.tolist() for one in expected]


@runs_here
@pytest.mark.parametrize("num_experts", [2, 3, 8, 13])
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_against_float64(num_experts: int, num_tokens: int) -> None:
    weights = make_weights(num_experts, 256, 128)
    ids, topk_weights = route(num_tokens, 2, num_experts)
    ids[0, 0] = -1
    x = inputs(num_tokens, 256)
    expected = judge(weights, x, ids, topk_weights)
    experts = create_experts(weights.copy_of(list(range(num_experts))), "kt")
    assert isinstance(experts, KtExperts)
    assert error(experts.apply(x, ids, topk_weights), expected) <= TOLERANCE


@runs_here
def test_a_batch_beyond_kt_kernel_s_buffers_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k26_plugins.ktransformers.experts.MAX_TOKENS", 8)
    weights = make_weights(8, 256, 128)
    ids, topk_weights = route(19, 2, 8)
    x = inputs(19, 256)
    expected = judge(weights, x, ids, topk_weights)
    assert error(create_experts(weights, "kt").apply(x, ids, topk_weights), expected) <= TOLERANCE


@runs_here
def test_what_load_was_given_is_kept_or_not_needed(record_property: Callable[[str, str], None]) -> None:
    """If the class that kt-kernel has for this CPU computes from the addresses that `load` was given, the weights must
    stay there."""
    weights = make_weights(8, 256, 128)
    ids, topk_weights = route(17, 2, 8)
    x = inputs(17, 256)
    experts = KtExperts.load(overwritten_when_let_go(weights))
    gc.collect()
    assert error(experts.apply(x, ids, topk_weights), judge(weights, x, ids, topk_weights)) <= TOLERANCE
    record_property(INSTRUCTION_SET, f"kt-kernel {type(experts.moe).__name__}")


@runs_here
def test_a_class_that_cannot_split_its_weights_is_refused_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """kt-kernel's class for AVX2 cannot split its weights; a class that the adapter does not know is refused as
    well."""
    monkeypatch.setattr("k26_plugins.ktransformers.experts.cores", lambda _: [Core(0, 0), Core(1, 1)])
    for name, refused in (("AVX2RawInt4_MOE", True), ("AMXInt4_KGroup_MOE", False)):
        monkeypatch.setattr(compat, "raw_int4_class", lambda _, name=name: type(name, (), {}))
        reason = KtExperts.unsupported(make_weights(2, 256, 128))
        assert (reason is not None) == refused
        if refused:
            assert "kt-kernel's AVX2RawInt4_MOE cannot split its weights among memory nodes [0, 1]" in str(reason)


@runs_here
def test_no_tokens() -> None:
    experts = create_experts(make_weights(8, 256, 128), "kt")
    ids = torch.empty(0, 2, dtype=torch.int32)
    assert experts.apply(inputs(0, 256), ids, torch.empty(0, 2)).shape == (0, 256)


@runs_here
def test_what_is_no_experts_id_counts_as_none() -> None:
    """An id that no expert has counts as none, even an id of the experts with which kt-kernel's are padded."""
    experts = create_experts(make_weights(5, 256, 128), "kt")
    slots = [(0, 5), (1, 7), (2, 384), (3, -2), (4, 2**40)]
    x, topk_weights = inputs(5, 256), torch.ones(5, 2)
    result, none = (
        experts.apply(x, torch.tensor(chosen), topk_weights) for chosen in (slots, [(right, -1) for right, _ in slots])
    )
    assert torch.equal(result, none)


@runs_here
def test_two_ranks_shards_sum_to_the_whole() -> None:
    """Each rank has its part of every expert, and the sums are right. KTransformers' own tensor parallelism gets this
    wrong (its issue 2076)."""
    weights = make_weights(4, 256, 256)
    ids, topk_weights = route(9, 2, 4)
    x = inputs(9, 256)
    total = torch.zeros(9, 256)
    for rank in range(2):
        rows = torch.cat([torch.arange(128) + 128 * rank + 256 * part for part in range(2)])
        shard = ExpertWeights(
            weights.w13_packed[:, rows].contiguous(),
            weights.w13_scale[:, rows].contiguous(),
            weights.w2_packed[:, :, 16 * rank : 16 * (rank + 1)].contiguous(),
            weights.w2_scale[:, :, 4 * rank : 4 * (rank + 1)].contiguous(),
        )
        total += create_experts(shard, "kt").apply(x, ids, topk_weights).float()
    assert error(total, judge(weights, x, ids, topk_weights)) <= TOLERANCE


@runs_here
def test_the_host_s_part_of_a_hybrid_run() -> None:
    weights = make_weights(8, 256, 128)
    placement = place(8, 3)
    ids, topk_weights = route(33, 4, 8)
    x = inputs(33, 256)
    expected = judge(weights, x, ids, topk_weights)
    hybrid = HybridExperts(
        create_experts(weights.copy_of(list(placement.device_ids))),
        create_experts(weights.copy_of(list(placement.host_ids)), "kt"),
        placement,
        torch.device("cpu"),
    )
    assert error(hybrid.apply(x, ids, topk_weights), expected) <= TOLERANCE


@runs_here
def test_a_shape_that_would_end_the_process_is_refused() -> None:
    with pytest.raises(
        ExpertsError, match=r"kt is not, because intermediate size of 64 on this rank is no multiple of 128"
    ):
        create_experts(make_weights(4, 256, 64), "kt")


@pytest.mark.skipif(compat.ends_the_process() is not None, reason="this kt-kernel ends the process when it is imported")
def test_the_snapshot_says_what_this_release_has() -> None:
    """The snapshot was made by reading the release's files; here kt-kernel itself is asked."""
    assert wrong_entries(read_snapshot("kt-kernel")[compat.kt_kernel_version()]) == {}


def test_a_name_that_kt_kernel_lost_is_one_clear_error() -> None:
    name = EngineName("json", "Here", why="test it", remove_when="never")
    with pytest.raises(UnsupportedEngineError, match=r"kt-kernel .* has no json.Here.*checked on kt-kernel"):
        compat.private(name)
