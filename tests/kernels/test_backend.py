"""The Triton backend behind the core's interface: chosen, self-tested, refused, missing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from k26_kernels import Shape, config
from k26_kernels.config import regimes
from k26_kernels.experts import make_plan
from k26_kernels.target import TARGETS, Device
from support.experts import error, inputs, judge, make_weights, route, to_device

from k26_plugins.common.experts import BACKENDS, Expert, ExpertsError, create_experts
from k26_plugins.common.experts.triton import TritonExperts, unusable_on
from k26_plugins.common.settings import batch_invariant_setting, experts_for_device

TOLERANCE = 5e-3


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Lets the backend onto a CPU, where the interpreter runs."""
    if device.type == "cpu":
        monkeypatch.setattr("k26_plugins.common.experts.triton.unusable_on", lambda device: None)
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
    half = experts.apply(x.to(device, torch.float16), ids.to(device), topk_weights.to(device))
    assert half.dtype == torch.float16
    assert error(half.cpu(), expected) <= TOLERANCE


@pytest.mark.parametrize("target", TARGETS)
def test_the_self_test_reaches_every_regime(target: str) -> None:
    """With the two experts that it tests, at the real size."""
    device, shape = Device(TARGETS[target], "a GPU without a file", 132), Shape(7168, 2048, 2)
    plans = [make_plan(device, shape, tokens, 2, 2) for tokens in TritonExperts.self_test_tokens]
    assert [plan.regime for plan in plans] == list(regimes(device, shape).values())


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
    """EPLB copies the rows of an expert over another's: the other then computes as it."""
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


def test_a_gpu_keeps_the_engines_experts_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("K26_EXPERTS", raising=False)
    if not torch.cuda.is_available():
        assert experts_for_device("cuda") == "engine"
    assert experts_for_device("xpu") == "engine"
    assert experts_for_device("cpu") == "auto"
    monkeypatch.setenv("K26_EXPERTS", "triton")
    assert experts_for_device("cuda") == "triton"


def test_a_gpu_takes_them_once_they_were_tuned_on_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("K26_EXPERTS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("k26_plugins.common.experts.triton.unusable_on", lambda device: None)
    monkeypatch.setattr("k26_kernels.device_of", lambda device: Device(TARGETS["sm_90"], "NVIDIA H200", 132))
    default = json.loads((config.FOLDER / config.DEFAULT).read_text())["sm_90"]["any"]
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    assert experts_for_device("cuda") == "engine"
    file = tmp_path / config.file_name("NVIDIA H200")
    file.write_text(json.dumps({"sm_90": {"7168x256x384": default}}))
    assert experts_for_device("cuda") == "triton"
    file.rename(tmp_path / config.file_name("NVIDIA H100 80GB HBM3"))
    assert experts_for_device("cuda") == "engine"


def test_the_batch_invariant_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv("K26_BATCH_INVARIANT", value)
        assert batch_invariant_setting() is expected
    monkeypatch.setenv("K26_BATCH_INVARIANT", "yes")
    with pytest.raises(ValueError, match="K26_BATCH_INVARIANT is 'yes'"):
        batch_invariant_setting()
