"""The benchmark, the tuner and the predictions, as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from bench import experts as bench
from bench import tune
from bench.peers import WAITS_FOR_DEVICE, Weights
from bench.routing import GLOBAL_EXPERTS, Layer, choose, expert_map, slots_here
from k26_kernels import KernelExperts, Shape
from k26_kernels.config import Regime, Tile

TINY = Layer("tiny", Shape(128, 128, 48))
FEW = Layer("few", Shape(128, 128, 6))


@pytest.mark.parametrize("kind", ["uniform", "zipf", "prefix"])
def test_routings(kind: str) -> None:
    ids = choose(kind, 600)
    assert ids.shape == (600, 8)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    counts = ids.flatten().long().bincount(minlength=GLOBAL_EXPERTS).sort(descending=True).values
    # Evenly 12.5 a piece; the most popular of a skewed choice takes part in most rows.
    assert counts[0] < 40 if kind == "uniform" else counts[0] >= 300
    assert torch.equal(choose(kind, 600), ids)


def test_bytes_of_an_expert() -> None:
    """Those of the published model, but for its 24 bytes of shapes."""
    assert Layer("whole", Shape(7168, 2048, 384)).expert_bytes == 24_772_632 - 24


def test_a_batch_is_measured(device: torch.device) -> None:
    """Rows for us and for each peer, of which one always runs; it agrees with us."""
    seconds = []

    def clock(run: object, graph: bool) -> float:
        seconds.append(graph)
        run()  # type: ignore[operator]
        return 2.0

    runs = bench.prepare(Weights.random(6, 128, 128, device))
    rows = {row.name: row for row in bench.measure(FEW, "uniform", 40, runs, (1e6, 1e9), device, clock)}
    data = bench.batches(FEW, "uniform", 40, device)
    touched = sum(len(slots_here(ids.cpu(), FEW).unique()) for _, _, ids in data)
    assert touched > 1
    assert rows[bench.OURS].of_copy == pytest.approx(touched * FEW.expert_bytes / 2.0 / 1e6)
    assert rows[bench.OURS].microseconds == pytest.approx(2e6 / len(data))
    peer = rows[WAITS_FOR_DEVICE]
    assert peer.difference is not None
    assert peer.difference < 1e-2
    assert seconds == [True, False]
    if importlib.util.find_spec("vllm") is None:
        assert rows["vLLM Marlin MoE"].note == "vllm is not installed"
    for row in rows.values():
        assert row.name in bench.line(row)


def test_the_tuner_takes_the_fastest(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights.random(48, 128, 128, device)
    experts = KernelExperts.from_checkpoint(weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale)
    fastest = Tile(128, 64, 8, 5)

    def time_of(experts: KernelExperts, layer: Layer, regime: Regime, tokens: int) -> float:
        return 9.0 - (regime.w13 == fastest) - (regime.w2 == fastest)

    monkeypatch.setattr(tune, "time_of", time_of)
    assert {(regime.w13, regime.w2) for regime in tune.tune(experts, TINY).values()} == {(fastest, fastest)}


def test_a_tile_is_timed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights.random(48, 128, 128, device)
    experts = KernelExperts.from_checkpoint(weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale)
    ran = []
    monkeypatch.setattr(tune, "seconds_of", lambda run, repeats: ran.append(run()) or 1.0)
    regime = tune.regimes(experts.device, TINY.shape)["16"]
    assert tune.time_of(experts, TINY, regime, 5) == 1.0
    assert len(ran) == 1


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the plot needs the bench extra (matplotlib)"
)
def test_the_plot(tmp_path: Path) -> None:
    rows = [
        bench.Row("tiny", "uniform", 1, "k26", 10.0, 0.5, 0.1, 0.0),
        bench.Row("tiny", "uniform", 1, "x", note="no"),
    ]
    bench.plot(rows, (1e12, 1e14), "a GPU", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_expert_map_of_a_rank() -> None:
    local = expert_map(TINY)
    assert local is not None
    assert local.tolist() == [*range(48), *[-1] * (GLOBAL_EXPERTS - 48)]
