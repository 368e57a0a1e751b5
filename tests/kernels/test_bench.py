"""Tests of the benchmark and of `k26 tune`; without a GPU, Triton's interpreter takes its place."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bench import experts as bench
from bench import one_launch
from bench.dense import WAITS_FOR_DEVICE, dequantize_and_dense
from bench.layers import GLOBAL_EXPERTS, LAYERS
from click.testing import CliRunner
from k26_kernels import KernelExperts
from k26_kernels.config import GemmConfig, KernelConfig, default_configs, kernel_configs, measured

from k26_plugins.cli import app
from k26_plugins.common.experts.base import ExpertWeights
from k26_plugins.common.experts.outcome import OURS, outcome_file, read_outcome
from k26_plugins.common.experts.peer import NotHereError, Run
from k26_plugins.common.purpose import Purpose
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny
from k26_plugins.operate.tune import __main__ as at_start
from k26_plugins.operate.tune import measure, tiles
from k26_plugins.operate.tune.clock import Clock, clock_of
from k26_plugins.operate.tune.routing import Layer

TINY = Layer("tiny", 128, 128, 48)
FEW = Layer("few", 128, 128, 6)


@pytest.mark.parametrize("kind", ["uniform", "zipf", "prefix"])
def test_routings(kind: str) -> None:
    ids = TINY.choose(kind, 600)
    assert ids.shape == (600, 8)
    assert all(len(set(row)) == 8 for row in ids.tolist())
    counts = ids.flatten().long().bincount(minlength=GLOBAL_EXPERTS).sort(descending=True).values
    # An even choice gives each expert 12.5 of the 4,800 pairs; a skewed choice has its most popular expert in at least
    # half of the rows.
    assert counts[0] < 40 if kind == "uniform" else counts[0] >= 300
    assert torch.equal(TINY.choose(kind, 600), ids)


def test_bytes_of_an_expert() -> None:
    """An expert has as many bytes as in the published model, less the 24 bytes of its weight_shape tensors."""
    assert LAYERS["whole"].expert_bytes == 24_772_632 - 24


def test_a_batch_is_measured(device: torch.device) -> None:
    """Our kernels and each peer get a row; the one peer that runs everywhere agrees with our kernels."""
    seconds = []

    def clock(run: object, graph: bool) -> float:
        seconds.append(graph)
        run()  # type: ignore[operator]
        return 2.0

    runs = bench.prepare(measure.random_weights(FEW, device))
    rows = {row.name: row for row in bench.measure(FEW, "uniform", 40, runs, (1e6, 1e9), device, clock)}
    data = FEW.batches("uniform", 40, device)
    touched = sum(len(FEW.pairs_here(batch.topk_ids.cpu()).unique()) for batch in data)
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


def test_one_launch_of_each(device: torch.device) -> None:
    """`bench.one_launch`, which a sanitizer watches on a GPU, finds every result right. Its batch with more pairs than
    one launch sorts is left out, because it would take too long here."""
    one_launch.small_ones(device, (1, 5))


def test_one_launch_notices_a_wrong_result() -> None:
    with pytest.raises(SystemExit, match="experts is wrong"):
        one_launch.compare("experts", torch.ones(3), torch.tensor([1.0, 1.0, 1.1]))


def experts_of(layer: Layer, device: torch.device) -> KernelExperts:
    weights = measure.random_weights(layer, device)
    return KernelExperts.from_checkpoint(weights.w13_packed, weights.w13_scale, weights.w2_packed, weights.w2_scale)


def test_the_fastest_tiles_are_taken(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = GemmConfig(128, 64, 8, 5)

    def time_of(experts: KernelExperts, layer: Layer, config: KernelConfig, tokens: int, clock: Clock) -> float:
        return 9.0 - (config.w13 == fastest) - (config.w2 == fastest)

    monkeypatch.setattr(tiles, "time_of", time_of)
    searched: list[str] = []
    found = tiles.fastest_tiles(experts_of(TINY, device), TINY, clock_of(device), 60.0, searched.append)
    assert {(config.w13, config.w2) for config in found.values()} == {(fastest, fastest)}
    assert len(searched) == measure.SEARCHES
    # Without time for a search, the present configs are kept.
    before = dict(default_configs("sm_90"))
    assert tiles.fastest_tiles(experts_of(TINY, device), TINY, clock_of(device), 0.0, searched.append) == before


def test_a_tile_is_timed(device: torch.device) -> None:
    experts = experts_of(TINY, device)
    config = kernel_configs(experts.device, experts.shape)["16"]
    ran = []

    def clock(run: Callable[[], object], graph: bool) -> float:
        ran.append(run())
        return 1.0

    assert tiles.time_of(experts, TINY, config, 33, clock) == 1.0
    assert len(ran) == 1

    def fails(run: Callable[[], object], graph: bool) -> float:
        raise RuntimeError("out of resources")

    assert tiles.time_of(experts, TINY, config, 33, fails) == float("inf")


def missing(weights: ExpertWeights) -> Run:
    raise NotHereError("humming is not installed")


def wrong(weights: ExpertWeights) -> Run:
    """Return a peer that is the fastest of all and wrong, as issues report of some GPUs: every token gets the same
    row."""
    return lambda x, topk_weights, ids, local: x[:1].expand(x.shape)


def too_long(weights: ExpertWeights) -> Run:
    right = dequantize_and_dense(weights)

    def run(x: torch.Tensor, *batch: torch.Tensor | None) -> torch.Tensor:
        if len(x) > 33:
            raise RuntimeError("out of memory")
        return right(x, *batch)  # type: ignore[arg-type]

    return run


@pytest.fixture
def tunable(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder of a small checkpoint, on a machine that seems to have a GPU and SGLang with four kernels of its
    own.

    Without a GPU, Triton's interpreter takes its place.
    """
    peers = {"dense": dequantize_and_dense, "wrong": wrong, "too long": too_long, "missing": missing}
    monkeypatch.setattr("k26_plugins.operate.tune.device.gpu", lambda: device)
    monkeypatch.setattr("k26_plugins.operate.tune.device.peers_of", lambda engine: peers)
    monkeypatch.setattr("k26_plugins.operate.tune.device.is_installed", lambda name: name == "sglang")
    for module in (measure, at_start):
        monkeypatch.setattr(module, "QUICK", measure.Effort((33, 40), ("uniform",), 0.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_tiny(tmp_path / "tiny", TinySizes(moe_intermediate_size=256, experts=16))
    before = dict(measured)
    yield tmp_path / "tiny"
    measured.clear()
    measured.update(before)


def test_what_a_server_s_start_runs(tunable: Path, tmp_path: Path) -> None:
    """The measurement that a server's start runs, here in the test's own process, writes its outcome to the file in
    which the server looks for it."""
    del tunable
    at_start.main("128x128x8", "sglang")
    (file,) = (tmp_path / "cache/k26-plugins/tuned").glob("*.json")
    outcome = read_outcome(file)
    assert (outcome.key.shape, outcome.purpose) == ("128x128x8", Purpose.BOTH)
    assert outcome_file(outcome.key) == file
    with pytest.raises(SystemExit, match="names no sizes"):
        at_start.main("128", "sglang")


def test_the_whole_of_k26_tune(tunable: Path, tmp_path: Path) -> None:
    plot = ["--plot", str(tmp_path / "plot.png")] if importlib.util.find_spec("matplotlib") else []
    command = ["tune", "--quick", "--checkpoint", str(tunable), "--tp", "2", "--ep", "2", "--for", "decode", *plot]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "cache/k26-plugins/tuned").glob("*.json")
    assert str(file) in done.stdout.replace("\n", "")
    outcome = read_outcome(file)
    assert (outcome.key.shape, outcome.purpose) == ("128x128x8", Purpose.DECODE)
    assert outcome.key.engine.startswith("sglang")
    found = {(timing.kernel, timing.tokens): timing for timing in outcome.timings}
    assert found.keys() == {
        (kernel, tokens) for kernel in (OURS, "dense", "wrong", "too long", "missing") for tokens in (33, 40)
    }
    for kernel in (OURS, "dense"):
        for tokens in (33, 40):
            error, taken = found[kernel, tokens].error, found[kernel, tokens].milliseconds
            assert error is not None
            assert error < 1e-2
            assert taken is not None
    assert found["wrong", 40].error is not None
    assert found["wrong", 40].error > 0.1
    assert found["too long", 40].note == "RuntimeError: out of memory"
    assert found["missing", 33].note == "humming is not installed"
    assert "missing: humming is not installed" in done.stdout
    assert "chosen: k26: " in done.stdout or "chosen: dense: " in done.stdout
    assert not plot or (tmp_path / "plot.png").stat().st_size > 1000


REFUSED = {
    "a rest": (["--tp", "3"], "16 experts of 256 rows cannot be dealt out to 1 ranks and cut in 3"),
    "half a group": (["--tp", "4"], "multiples of 128, on each rank: these are 128 and 64"),
    "a folder that cannot be made": (["--save", "/dev/null/tuned.json"], "/dev/null/tuned.json cannot be written"),
    "no checkpoint": (["--checkpoint", "/nowhere"], "/nowhere"),
    "an engine that is not there": (["--engine", "vllm"], "kernels of vllm, which is not installed here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_said_before_the_work(tunable: Path, name: str) -> None:
    options, said = REFUSED[name]
    done = CliRunner().invoke(app, ["tune", "--quick", "--checkpoint", str(tunable), *options])
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("installed", "said"), [((), "neither vLLM nor SGLang"), (("vllm", "sglang"), "say with --engine")]
)
def test_the_engine_is_named_where_it_is_open(
    tunable: Path, monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("k26_plugins.operate.tune.device.is_installed", lambda name: name in installed)
    done = CliRunner().invoke(app, ["tune", "--quick", "--checkpoint", str(tunable)])
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_nothing_to_measure() -> None:
    done = CliRunner().invoke(app, ["tune"])
    assert done.exit_code == 1
    assert "`k26 tune` needs the GPU that it measures, and torch finds none." in done.stderr


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
    local = TINY.expert_map()
    assert local is not None
    assert local.tolist() == [*range(48), *[-1] * (GLOBAL_EXPERTS - 48)]
