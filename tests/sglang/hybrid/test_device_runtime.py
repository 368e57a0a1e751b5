"""Tests of the device's runtime, by which a CUDA graph waits for the CPU's experts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.native_sample import needs_compiler, needs_set
from support.pretended_device import PretendedDevice, be_late, compile_runtime
from support.sglang_server import runs_hybrid

from k26_plugins.common.experts import ExpertsError
from k26_plugins.common.experts.native import threads
from k26_plugins.common.experts.native.threads import process_threads
from k26_plugins.common.host import device_runtime
from k26_plugins.common.host.device_runtime import DeviceRuntimeError
from k26_plugins.common.model.config import K26Config

pytestmark = runs_hybrid


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA: it brings no runtime")
def test_nvidia_s_runtime_has_what_is_called() -> None:
    """The CUDA runtime that torch has loaded has each function that is called: without a device, each call fails with
    the runtime's own error text."""
    device_runtime.device_runtime.cache_clear()
    runtime = device_runtime.device_runtime()
    memory = torch.empty(1, dtype=torch.uint8)
    with pytest.raises(DeviceRuntimeError, match=r"cudaThreadExchangeStreamCaptureMode fails with .+ \(\d+\)"):
        runtime.pinned(1)
    with pytest.raises(DeviceRuntimeError, match=r"cudaStreamIsCapturing fails with .+ \(\d+\)"):
        runtime.is_capturing(0)
    with pytest.raises(DeviceRuntimeError, match=r"cudaMemcpyAsync fails with .+ \(\d+\)"):
        runtime.copy(0, memory, memory, to_host=True)
    with pytest.raises(DeviceRuntimeError, match=r"cudaLaunchHostFunc fails with .+ \(\d+\)"):
        runtime.launch(0, process_threads().native.k26_stream_submit, 0)


@needs_compiler
@needs_set
def test_a_step_whose_experts_did_not_come_ends_before_it_is_answered(
    tiny_folder: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SGLang's scheduler raises an error for such a step instead of answering it. CUDA graphs are on, and the runtime
    is that of a pretended device."""
    from sglang.srt.managers.scheduler import Scheduler

    from k26_plugins.sglang import hybrid

    device = PretendedDevice(compile_runtime(tmp_path))
    monkeypatch.setattr(hybrid, "device_runtime", lambda: device.runtime)
    answered: list[object] = []
    monkeypatch.setattr(Scheduler, "process_batch_result", lambda self, batch, result: answered.append(result))
    settings = hybrid.hybrid_settings(K26Config.from_path(tiny_folder))
    assert settings is not None
    assert settings.runtime is device.runtime
    monkeypatch.setattr(threads, "_process_threads", None)  # as in a new process
    result, waited = SimpleNamespace(), []
    result.copy_done = SimpleNamespace(synchronize=lambda: waited.append(result))
    Scheduler.process_batch_result(None, None, result)
    assert answered == waited == [result]
    be_late(device, process_threads())
    with pytest.raises(ExpertsError, match="restart the server"):
        Scheduler.process_batch_result(None, None, result)
    assert answered == [result]
