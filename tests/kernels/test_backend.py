"""Tests of the Triton backend behind the core's interface: when it is chosen, self-tested, refused, or missing.

Results are compared with float64 on weights that compressed-tensors unpacks.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from k26_kernels import Shape, config, device_of
from k26_kernels.config import default_configs, kernel_configs
from k26_kernels.experts import make_plan
from k26_kernels.target import TARGETS, Device
from support.experts import error, inputs, judge, make_weights, route, to_device

from k26_plugins.common import metrics
from k26_plugins.common.experts import BACKENDS, Expert, ExpertsError, create_experts, tune_at_start
from k26_plugins.common.experts.base import LayerSizes
from k26_plugins.common.experts.outcome import OURS, Outcome, Timing, outcome_file, write_outcome
from k26_plugins.common.experts.triton import TritonExperts, unusable_on
from k26_plugins.common.experts.tuned import backend_for, here, tuned_answer
from k26_plugins.common.purpose import Purpose
from k26_plugins.common.settings import BATCH_INVARIANT
from k26_plugins.operate.doctor.tuned import tuned_findings

TOLERANCE = 5e-3


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Let the backend run on a CPU, under Triton's interpreter."""
    if device.type == "cpu":
        monkeypatch.setattr("k26_plugins.common.experts.triton.unusable_on", lambda device: None)
        monkeypatch.setattr("k26_plugins.common.experts.tuned.unusable_on", lambda device: None)
        monkeypatch.setattr(TritonExperts, "device_type", "cpu")


@pytest.mark.usefixtures("interpreted")
def test_it_is_the_first_choice_and_passes_its_self_test(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonExperts, "self_test_tokens", (1, 5))
    weights = make_weights(2, 128, 128)
    ids, topk_weights = route(3, 2, 2)
    x = inputs(3, 128)
    expected = judge(weights, x, ids, topk_weights)
    on_device = to_device(weights, device)
    storage = on_device.w13_packed.data_ptr()
    experts = create_experts(on_device)
    assert experts.name == "triton"
    assert experts.tensors()["w13_packed"].data_ptr() == storage
    workspace = torch.empty(experts.workspace_bytes(3, 2), dtype=torch.uint8, device=device)
    result = experts.apply(x.to(device), ids.to(device), topk_weights.to(device), workspace=workspace)
    assert error(result.cpu(), expected) <= TOLERANCE
    buffers = torch.stack([x, x.flip(0)]).to(device)
    by_expert = torch.empty_like(buffers)
    experts.apply_by_expert(buffers, torch.tensor([3, 2], device=device), by_expert, expected=2.0)
    for index, count in enumerate([3, 2]):
        one = judge(weights, buffers[index, :count].cpu(), torch.full((count, 1), index), torch.ones(count, 1))
        assert error(by_expert[index, :count].cpu(), one) <= TOLERANCE
    half = experts.apply(x.to(device, torch.float16), ids.to(device), topk_weights.to(device))
    assert half.dtype == torch.float16
    assert error(half.cpu(), expected) <= TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_the_self_test_reaches_every_config(target: str) -> None:
    """The self-test's batches, with the two experts that it tests at the real size, use every kernel config."""
    device, shape = Device(TARGETS[target], "a GPU without a file", 132), Shape(7168, 2048, 2)
    plans = [make_plan(device, shape, tokens, 2, 2) for tokens in TritonExperts.self_test_tokens]
    assert [plan.config for plan in plans] == list(kernel_configs(device, shape).values())


@pytest.mark.usefixtures("interpreted")
def test_rows_are_restored_to_the_checkpoint_s(device: torch.device) -> None:
    weights = make_weights(3, 128, 128)
    experts = TritonExperts.load(to_device(weights, device))
    rows = {name: tensor[[2, 0]].clone() for name, tensor in experts.tensors().items()}
    restored, expected = experts.restore(rows), weights.copy_of([2, 0])
    for name in Expert._fields:
        assert torch.equal(getattr(restored, name).cpu(), getattr(expected, name)), name


@pytest.mark.usefixtures("interpreted")
def test_an_experts_rows_can_be_moved(device: torch.device) -> None:
    """When EPLB copies one expert's rows over another's, the other expert must compute what the first one does."""
    experts = TritonExperts.load(
        make_weights(3, 128, 128).copy_of([0, 1, 2]) if device.type == "cpu" else pytest.skip()
    )
    for tensor in experts.tensors().values():
        assert tensor.is_contiguous()
        flat = tensor.view(3, -1)
        flat[2].copy_(flat[1])
    x, ones = inputs(2, 128).to(device), torch.ones(2, 1, device=device)
    moved, original = (experts.apply(x, torch.full((2, 1), index, device=device), ones) for index in (2, 1))
    assert torch.equal(moved, original)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("failure", ["wrong", "raises"])
def test_a_kernel_that_fails_is_never_served(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def apply(self: TritonExperts, hidden_states: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        if failure == "raises":
            raise RuntimeError("PassManager::run failed")
        return torch.zeros_like(hidden_states)

    monkeypatch.setattr(TritonExperts, "apply", apply)
    with caplog.at_level(logging.WARNING):
        assert create_experts(make_weights(2, 128, 128)).name in ("native", "cpu")
    assert "triton is not, because" in caplog.text
    assert ("PassManager::run failed" in caplog.text) == (failure == "raises")
    with pytest.raises(ExpertsError, match=r"triton is not, because i.* self-test on cpu"):
        create_experts(make_weights(2, 128, 128), "triton")


@pytest.mark.usefixtures("interpreted")
def test_sizes_that_the_kernels_do_not_have() -> None:
    with pytest.raises(ExpertsError, match="multiples of 128, on each rank: these are 128 and 64"):
        create_experts(make_weights(2, 128, 64), "triton")


def test_a_cpu_keeps_its_own_backend() -> None:
    assert unusable_on(torch.device("cpu")) == "the Triton kernels run on CUDA and ROCm GPUs, not on cpu"
    assert create_experts(make_weights(2, 128, 128)).name in ("native", "cpu")
    assert next(iter(BACKENDS)) == "triton"


def test_without_triton_the_core_says_so() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from k26_plugins.common.experts import BACKENDS
from k26_plugins.common.experts.triton import unusable_on
print(unusable_on(torch.device("cuda")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Triton cannot be imported (")
    assert done.stdout.endswith("install it with `pip install triton`\n")


SIZES = LayerSizes(48, 256, 128, torch.device("cpu"))
"""The sizes of a rank's part of a layer, on a CPU because Triton's interpreter takes the place of the rank's GPU."""
LOGGER = logging.getLogger(__name__)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Yield a function that writes an invented outcome for SIZES into the user's cache folder and returns its file.

    By default our kernels take half the time of Marlin in it.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("K26_TUNED", raising=False)
    monkeypatch.setattr("k26_plugins.common.experts.tuned.driver_version", lambda: "unknown")

    def write(block_size_k: int = 64, times: tuple[float, float] = (0.5, 1.0)) -> Path:
        tiles = {name: asdict(config) for name, config in default_configs("sm_90").items()}
        tiles["16"]["w2"]["BLOCK_SIZE_K"] = block_size_k
        timings = tuple(Timing(name, "uniform", 1, ms, 1e-3) for name, ms in zip((OURS, "marlin"), times, strict=True))
        key = here(SIZES.device, "vllm 1.0", "256x128x48")
        write_outcome(Outcome(key, Purpose.DECODE, tiles, timings), outcome_file(key))
        return outcome_file(key)

    before = dict(config.measured)
    yield write
    config.measured.clear()
    config.measured.update(before)
    make_plan.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is the interpreter")
@pytest.mark.usefixtures("interpreted")
def test_auto_takes_what_won(measured: Callable[..., Path]) -> None:
    """Once an outcome is found, its kernel configs serve layers of the measured hidden and intermediate size with any
    number of experts, for example the two of the self-test."""
    answer = tuned_answer(SIZES, "vllm 1.0", LOGGER)
    assert answer.backend == "engine"
    assert answer.why.endswith("`k26 tune` would measure it")
    file = measured()
    answer = tuned_answer(SIZES, "vllm 1.0", LOGGER)
    assert answer.backend == "triton"
    assert "k26 takes 0.50 of the time of marlin" in answer.why
    assert str(file) in answer.why
    device = device_of(SIZES.device)
    for num_experts in (48, 2):
        plan = make_plan(device, Shape(256, 128, num_experts), 64, 1, 384)
        assert (plan.config.BLOCK_SIZE_M, plan.config.w2.BLOCK_SIZE_K) == (16, 64)
    assert make_plan(device, Shape(128, 128, 48), 64, 1, 384).config == default_configs("sm_90")["16"]
    for other in (SIZES._replace(hidden_size=128), SIZES._replace(num_experts=47)):
        assert tuned_answer(other, "vllm 1.0", LOGGER).backend == "engine"
    assert tuned_answer(SIZES, "vllm 1.1", LOGGER).backend == "engine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is the interpreter")
@pytest.mark.usefixtures("interpreted")
def test_auto_measures_at_the_start_where_it_is_asked_to(
    measured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With K26_TUNE=start `auto` measures once. If the measurement fails, the engine's own experts serve, and the
    answer gives the reason."""
    monkeypatch.setenv("K26_TUNE", "start")
    failed = "import sys; sys.exit('no memory for the weights.')"
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-c", failed))
    answer = tuned_answer(SIZES, "vllm 1.0", LOGGER)
    assert answer.backend == "engine"
    assert "engine, and measuring failed: no memory for the weights; `k26 tune` would measure it" in answer.why
    file = measured()
    made = file.read_bytes()
    file.unlink()
    code = f"import pathlib; pathlib.Path({str(file)!r}).write_bytes({made!r})"
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-c", code))
    assert tuned_answer(SIZES, "vllm 1.0", LOGGER).backend == "triton"
    monkeypatch.setattr(tune_at_start, "COMMAND", (sys.executable, "-c", failed))
    assert tuned_answer(SIZES, "vllm 1.0", LOGGER).backend == "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is the interpreter")
@pytest.mark.usefixtures("interpreted")
def test_auto_keeps_the_engines_where_they_won(measured: Callable[..., Path]) -> None:
    measured(times=(1.0, 0.9))
    answer = tuned_answer(SIZES, "vllm 1.0", LOGGER)
    assert answer.backend == "engine"
    assert answer.why.startswith("marlin won: for decode k26 takes 1.11 of the time of marlin")
    assert not config.measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is the interpreter")
@pytest.mark.usefixtures("interpreted")
def test_tiles_that_cannot_cut_the_shape_are_not_used(measured: Callable[..., Path]) -> None:
    measured(block_size_k=96)
    answer = tuned_answer(SIZES, "vllm 1.0", LOGGER)
    assert answer.backend == "engine"
    assert "does not cut 128 inputs" in answer.why
    assert not config.measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is the interpreter")
@pytest.mark.usefixtures("interpreted")
def test_the_doctor_says_which_measurement_is_used(
    measured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> tuple[str, str]:
        (finding,) = tuned_findings(SIZES.device)
        return finding.level, finding.detail

    monkeypatch.setattr("k26_plugins.operate.doctor.tuned.unusable_on", lambda device: None)
    monkeypatch.setattr("k26_plugins.operate.doctor.tuned.installed_engine", lambda name: "vllm 1.0")
    monkeypatch.setattr("k26_plugins.operate.doctor.tuned.is_installed", lambda name: name == "vllm")
    assert said() == ("note", "nothing was measured on this GPU: servers take the engine's own experts")
    file = measured()
    level, detail = said()
    assert level == "ok"
    assert detail.startswith(
        "vllm 1.0, 256x128x48: the core's kernels, for decode k26 takes 0.50 of the time of marlin"
    )
    monkeypatch.setattr("k26_plugins.common.experts.tuned.driver_version", lambda: "580.2")
    assert said() == ("note", f"vllm 1.0, 256x128x48: not used, here is driver 580.2 instead of unknown ({file})")
    monkeypatch.setenv("K26_TUNED", str(file))
    level, detail = said()
    assert level == "ok"
    assert detail.endswith(f"(K26_TUNED={file}, though here is driver 580.2 instead of unknown)")
    file.write_text("{}")
    level, detail = said()
    assert level == "BAD"
    assert detail.startswith(f"{file} is no outcome of `k26 tune` ")
    monkeypatch.setenv("K26_TUNED", "/nowhere")
    assert said() == ("BAD", "K26_TUNED is '/nowhere': choose an existing file of `k26 tune`, or unset it.")


def test_what_auto_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU `auto` stays, for the core to take its first backend that passes the self-test; on a device that the
    kernels do not support, `auto` becomes the engine's own experts.

    A worker's report to the server's endpoint says which experts were taken and why.
    """
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(metrics, "_folder", tmp_path)
    logger = logging.getLogger("k26")
    assert backend_for("auto", SIZES, "vllm 1.0", logger) == "auto"
    xpu = SIZES._replace(device=torch.device("xpu"))
    assert backend_for("triton", xpu, "vllm 1.0", logger) == "triton"
    with caplog.at_level(logging.INFO):
        assert {backend_for("auto", xpu, "vllm 1.0", logger) for _ in range(3)} == {"engine"}
    said = "the engine's own INT4 experts are taken on xpu: the Triton kernels run on CUDA and ROCm GPUs, not on xpu"
    assert caplog.text.count(said) == 1
    (report,) = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert report["chosen"]["engine"].startswith("the Triton kernels run on CUDA and ROCm GPUs, not on xpu")


def test_the_batch_invariant_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("K26_BATCH_INVARIANT", value)
        assert BATCH_INVARIANT.read() is expected
    monkeypatch.setenv("K26_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="K26_BATCH_INVARIANT is 'yes'"):
        BATCH_INVARIANT.read()
