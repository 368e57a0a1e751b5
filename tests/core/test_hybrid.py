"""Tests of hybrid runs: the placement of experts on the device and in the host's memory, and that their sum does not
depend on it. The judge is the float64 product of support/experts.py."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from support.experts import error, inputs, judge, make_weights, route
from support.made_ready import record

from k26_plugins.common.expert_costs import MEASURED_TOKENS, Line, StreamCosts
from k26_plugins.common.experts import BACKENDS, Batches, ExpertsError, ExpertWeights, create_experts, find_backend
from k26_plugins.common.experts.cpu import CpuExperts
from k26_plugins.common.experts.deferred import Deferral
from k26_plugins.common.experts.hybrid import FEW_TOKENS, HybridExperts
from k26_plugins.common.experts.moving import Uses
from k26_plugins.common.experts.placement import PlacementError, Profile, place
from k26_plugins.common.experts.streaming import Streaming
from k26_plugins.common.host import control_groups
from k26_plugins.common.host import memory as host_memory
from k26_plugins.common.host.memory import HostMemoryError, require_host_memory
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.settings import STREAM_FROM, check_settings

# One backend on its own has the same bound.
TOLERANCE = 6e-3
ON_HOST = [name for name in ("native", "cpu") if BACKENDS[name].unsupported(make_weights(1, 128, 64)) is None]


@pytest.mark.parametrize("on_device", [0, 1, 5, 7])
def test_the_sum_does_not_depend_on_the_placement(on_device: int) -> None:
    weights = make_weights(8, 128, 64)
    placement = place(8, on_device, counts=[3, 1, 4, 1, 5, 9, 2, 6])
    ids, topk_weights = route(19, 3, 8)
    ids[2, 1] = -1
    x = inputs(19, 128)
    device_experts = create_experts(weights.copy_of(list(placement.device_ids))) if on_device else None
    host_experts = create_experts(weights.copy_of(list(placement.host_ids)))
    hybrid = HybridExperts(device_experts, host_experts, placement, torch.device("cpu"))
    result = hybrid.apply(x, ids, topk_weights)
    assert result.dtype == x.dtype
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE
    out = torch.empty_like(x)
    assert hybrid.apply(x, ids, topk_weights, out=out) is out
    assert torch.equal(out, result)


@pytest.mark.parametrize("per_token", [1, 2, 9])
@pytest.mark.parametrize("tokens", [1, 19])
def test_deferred_experts_are_in_the_next_layer_s_sum(tokens: int, per_token: int) -> None:
    weights, placement = make_weights(8, 128, 64), place(8, 3)
    layers = deferring(weights, 3, Deferral(per_token, last_layer=3))
    left: torch.Tensor | float = 0.0
    for number, layer in enumerate(layers, start=1):
        x = inputs(tokens, 128) * number
        ids, topk_weights = route(tokens, 4, 8)
        ids[0, 1] = -1
        found = layer.apply(x, ids, topk_weights)
        is_least = torch.zeros_like(ids, dtype=torch.bool)
        for token in range(tokens):
            by_weight = sorted(range(4), key=topk_weights[token].tolist().__getitem__)
            is_least[token, by_weight[: per_token if number < 3 else 0]] = True
        is_deferred = is_least & torch.isin(ids, torch.tensor(placement.host_ids))
        now = judge(weights, x, ids.masked_fill(is_deferred, -1), topk_weights) + left
        assert error(found, now) <= TOLERANCE
        left = judge(weights, x, ids.masked_fill(~is_deferred, -1), topk_weights)


def test_what_an_ended_step_left_and_long_batches_are_not_deferred() -> None:
    weights = make_weights(8, 128, 64)
    layers = deferring(weights, 3, Deferral(2, last_layer=3))
    few, many = inputs(3, 128), inputs(FEW_TOKENS + 1, 128)
    first = layers[0].apply(few, *route(3, 4, 8))
    layers[1].apply(few, *route(3, 4, 8))  # the step ends before the last layer
    assert torch.equal(layers[0].apply(few, *route(3, 4, 8)), first)
    found = layers[1].apply(many, *route(FEW_TOKENS + 1, 4, 8))
    assert error(found, judge(weights, many, *route(FEW_TOKENS + 1, 4, 8))) <= TOLERANCE


def test_experts_that_are_used_more_move_to_the_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sum stays right while experts move, and the reported share of token–expert pairs that the device computes
    rises."""
    weights, shares = make_weights(8, 128, 64), list[float]()
    monkeypatch.setattr("k26_plugins.common.metrics.hybrid_hit_rate", shares.append)
    now = 0.0
    uses = Uses(logging.getLogger("moving"), moves=True, clock=lambda: now)
    layers = deferring(weights, 3, None)
    for layer in layers:
        uses.add(layer)
    x, (_, topk_weights) = inputs(24, 128), route(24, 3, 8)
    ids = torch.tensor([[7, 5, 2], [7, 0, -1], [5, 7, 9]], dtype=torch.int32).repeat(8, 1)
    caplog.set_level("INFO")
    for _ in range(4):
        for layer in layers:
            valid = ids.masked_fill(ids == 9, -1)
            assert error(layer.apply(x, ids, topk_weights), judge(weights, x, valid, topk_weights)) <= TOLERANCE
        uses.step()
        now += 10.0
    assert all({5, 7} < set(layer.placement.device_ids) for layer in layers)
    assert shares[0] == pytest.approx(2 / 7)
    assert shares[-1] == pytest.approx(6 / 7)
    assert "experts that are used more took a place on cpu" in caplog.text
    # Nothing is left to move.
    caplog.clear()
    now += 10.0
    uses.step()
    assert not caplog.text


def deferring(weights: ExpertWeights, on_device: int, deferral: Deferral | None) -> list[HybridExperts]:
    """Return layers 1 to 3 of a hybrid run, each with the same experts."""
    placement = place(weights.num_experts, on_device)
    return [
        HybridExperts(
            create_experts(weights.copy_of(list(placement.device_ids))),
            create_experts(weights.copy_of(list(placement.host_ids))),
            placement,
            torch.device("cpu"),
            deferral=deferral,
            layer=number,
        )
        for number in (1, 2, 3)
    ]


def hybrid(weights: ExpertWeights, on_device: int, streaming: Streaming, host: str = "auto") -> HybridExperts:
    placement = place(weights.num_experts, on_device)
    return HybridExperts(
        create_experts(weights.copy_of(list(placement.device_ids))),
        create_experts(weights.copy_of(list(placement.host_ids)), host),
        placement,
        torch.device("cpu"),
        streaming,
    )


@pytest.mark.parametrize("host", ON_HOST)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30], ids=["one-by-one", "at-once"])
def test_the_sum_does_not_depend_on_streaming(host: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("k26_plugins.common.experts.streamed.CHUNK_BYTES", chunk_bytes)
    weights = make_weights(8, 128, 64)
    streaming = Streaming("auto", 10)
    experts = hybrid(weights, 2, streaming, host)
    ids, topk_weights = route(19, 3, 8)
    ids[2, 1] = -1
    x = inputs(19, 128)
    assert streaming.choose([1, 0, 2, 1, 1, 1], 10) == [0, 2, 3, 4, 5]
    assert streaming.choose([1] * 6, 9) == []
    result = experts.apply(x, ids, topk_weights)
    assert result.dtype == x.dtype
    assert error(result, judge(weights, x, ids, topk_weights)) <= TOLERANCE
    # Only a part of the host's experts is streamed.
    monkeypatch.setattr(Streaming, "choose", lambda self, counts, tokens: [4, 1])
    assert error(experts.apply(x, ids, topk_weights), judge(weights, x, ids, topk_weights)) <= TOLERANCE


def test_what_streams_is_ready_for_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's backend for streamed experts is made ready before the first batch, for as many experts as are copied
    at a time, however many experts a batch needs."""
    monkeypatch.setattr("k26_plugins.common.experts.streamed.CHUNK_BYTES", 128 * 64 * 8)
    seen = record(monkeypatch, *BACKENDS.values())
    batches = Batches(3, 8, torch.float32, logging.getLogger("engine"))
    streaming = Streaming("auto", 10, batches)
    hybrid(make_weights(8, 128, 64), 2, streaming, "cpu")
    assert streaming._stream is not None
    assert 1 < streaming._stream.chunk < 6
    assert seen == [(streaming._stream.chunk, batches)]


def test_experts_with_the_most_tokens_are_streamed_until_both_sides_end_together() -> None:
    # On the host an expert takes 1 s and each token 1 s; streamed 4 s, whatever the tokens.
    costs = StreamCosts(Line(1, 1), Line(4, 0))
    assert costs.choose([1, 1]) == []  # 4 s on the host
    assert costs.choose([1, 1, 1]) == [0]  # 4 s beside 4 s, instead of 6 s
    assert costs.choose([9, 1]) == [0]  # 2 s beside 4 s, instead of 12 s
    assert costs.choose([5, 0, 9, 9]) == [2, 3]  # 6 s beside 8 s; all three would take 12 s, one alone 16 s
    assert costs.predict([5, 0, 9, 9]) == 8
    assert StreamCosts(Line(1, 1), Line(1e6, 0)).choose([9] * 8) == []
    assert costs.choose([]) == costs.choose([0, 0]) == []


def test_a_line_goes_through_both_measurements() -> None:
    low, high = MEASURED_TOKENS
    line = Line.through(3.0, 3.0 + 2 * (high - low))
    assert (line.seconds(low), line.seconds(high)) == (3.0, 3.0 + 2 * (high - low))


def test_streamed_experts_that_differ_are_not_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    restore = CpuExperts.restore

    def swapped(self: CpuExperts, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        weights = restore(self, tensors)
        return ExpertWeights(weights.w13_packed.roll(64, 1), weights.w13_scale, weights.w2_packed, weights.w2_scale)

    monkeypatch.setattr(CpuExperts, "restore", swapped)
    assert_streaming_is_off(r"experts streamed to cpu differ from the CPU's by", caplog)


def test_a_device_that_fails_leaves_long_prompts_on_the_host(caplog: pytest.LogCaptureFixture) -> None:
    assert_streaming_is_off("ExpertsError on cpu: no experts backend can be used", caplog, device_backend="triton")


def test_batch_invariance_turns_streaming_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("K26_BATCH_INVARIANT", "1")
    assert_streaming_is_off("K26_BATCH_INVARIANT asks", caplog)


def assert_streaming_is_off(why: str, caplog: pytest.LogCaptureFixture, device_backend: str = "auto") -> None:
    """Assert that a warning says why, and that batches that would be streamed are computed on the host."""
    weights = make_weights(4, 128, 64)
    streaming = Streaming(device_backend, 1)
    experts = hybrid(weights, 1, streaming, "cpu")
    assert re.search("long prompts are computed where the experts are: .*" + why, caplog.text)
    assert streaming.choose([1, 1, 1], 5) == []
    ids, topk_weights = route(5, 2, 4)
    x = inputs(5, 128)
    assert error(experts.apply(x, ids, topk_weights), judge(weights, x, ids, topk_weights)) <= TOLERANCE


@pytest.mark.parametrize(("value", "meaning"), [("", None), ("never", "never"), ("AUTO", "auto"), ("2048", 2048)])
def test_from_where_on_is_streamed(value: str, meaning: int | str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K26_STREAM_FROM", value)
    if meaning is None:
        with pytest.raises(ValueError, match="K26_STREAM_FROM is '': choose auto, never or a number of tokens"):
            check_settings()
    else:
        check_settings()
        assert STREAM_FROM.read() == meaning


def test_an_expert_map_is_refused() -> None:
    weights = make_weights(2, 128, 64)
    hybrid = HybridExperts(None, create_experts(weights), place(2, 0), torch.device("cpu"))
    with pytest.raises(ExpertsError, match="take no expert map"):
        hybrid.apply(inputs(1, 128), *route(1, 1, 2), expert_map=torch.zeros(2, dtype=torch.int32))


def test_a_tensor_of_another_shape_is_named_before_anything_starts() -> None:
    hybrid = HybridExperts(None, create_experts(make_weights(2, 128, 64)), place(2, 0), torch.device("cpu"))
    ids, topk_weights = route(3, 1, 2)
    with pytest.raises(ExpertsError, match=r"topk_weights has shape \[2, 1\], expected \[3, 1\]"):
        hybrid.apply(inputs(3, 128), ids, topk_weights[:2])
    with pytest.raises(ExpertsError, match=r"out has shape \[3, 64\], expected \[3, 128\]"):
        hybrid.apply(inputs(3, 128), ids, topk_weights, out=inputs(3, 64))
    assert not hybrid.counts.any()


def test_the_first_or_the_most_used_are_on_the_device() -> None:
    assert place(5, 2).device_ids == (0, 1)
    placement = place(5, 2, counts=[1, 7, 0, 7, 9])
    assert (placement.device_ids, placement.host_ids) == ((1, 4), (0, 2, 3))
    assert placement.device_map().tolist() == [-1, 0, -1, -1, 1]
    assert placement.host_map().tolist() == [0, -1, 1, 2, -1]


@pytest.mark.parametrize("on_device", [-1, 5, 6])
def test_a_number_that_leaves_no_hybrid_run_is_refused(on_device: int) -> None:
    with pytest.raises(PlacementError, match=rf"{on_device} of 5 experts.*choose 0 to 4"):
        place(5, on_device)


def test_a_profile_is_kept_and_checked(tiny_folder: Path, tmp_path: Path) -> None:
    config = K26Config.from_path(tiny_folder)
    counts = [[0] * 8, [8, 0, 0, 0, 0, 0, 0, 2], [5, 0, 5, 0, 0, 0, 0, 0]]
    file = tmp_path / "profile.json"
    Profile(10, counts).save(file)
    profile = Profile.load(file, config)
    assert profile == Profile(10, counts)
    assert profile.hit_rate(1) == pytest.approx((8 + 5) / 20)
    assert profile.hit_rate(2) == 1.0
    assert profile.hit_rate_of_first(2) == pytest.approx((8 + 5) / 20)
    Profile(10, counts[1:]).save(file)
    with pytest.raises(PlacementError, match=r"in 2 layers, this model has 8 in 3.*k26 profile"):
        Profile.load(file, config)
    file.write_text("{")
    with pytest.raises(PlacementError, match=r"is no expert profile.*k26 profile"):
        Profile.load(file, config)


def test_memory_that_does_not_suffice_is_refused_with_the_numbers() -> None:
    require_host_memory(1 << 20, "one", "two")
    with pytest.raises(HostMemoryError, match=r"300 experts need 93132.3 GiB .*, [0-9.]+ GiB are available: add"):
        require_host_memory(10**14, "300 experts", "add memory")


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "cgroup").write_text("0::/\n")
    monkeypatch.setattr(control_groups, "PROC", tmp_path)
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    assert host_memory.available_bytes() == 4_000_000
    assert host_memory.total_bytes() == 5_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.available_bytes() > 4_000_000


def test_a_backend_of_another_package_is_found_by_name() -> None:
    with pytest.raises(ExpertsError, match=r"choose auto or one of .*kt"):
        find_backend("nothing")
