"""Tests of a hybrid run's command line: what is accepted, and what is refused before anything is loaded."""

from __future__ import annotations

import argparse
import inspect
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sglang_server import HAS_ENTRY_POINT, hybrid_flags, runs_hybrid

from k26_plugins.common.experts.placement import PlacementError
from k26_plugins.common.host import device_runtime
from k26_plugins.common.host.memory import HostMemoryError
from k26_plugins.common.model.config import K26Config

pytestmark = runs_hybrid

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "other-weights": ({"kt_weight_path": "/elsewhere"}, ValueError, "--kt-weight-path is /elsewhere.*give it twice"),
    "converted": ({"kt_method": "AMXINT8"}, ValueError, "--kt-method AMXINT8 needs converted weights: give RAWINT4"),
    "deferred-across-ranks": (
        {"kt_max_deferred_experts_per_token": 2, "pp_size": 2},
        ValueError,
        "from a layer to the next: leave it out, or --pp-size\\.",
    ),
    "deferred-less-than-none": (
        {"kt_max_deferred_experts_per_token": -1},
        ValueError,
        "is -1: give a number of experts",
    ),
    "expert-parallel": ({"ep_size": 2}, ValueError, "leave out --ep-size"),
    "two-batches": (
        {"enable_two_batch_overlap": True, "moe_a2a_backend": "deepep", "ep_size": 2},
        ValueError,
        "--enable-two-batch-overlap needs expert parallelism .*leave it out",
    ),
    "saved-state": ({"load_format": "sharded_state"}, ValueError, "--load-format sharded_state .*leave it out"),
    "no-number": ({"kt_num_gpu_experts": None}, ValueError, "needs --kt-num-gpu-experts"),
    "all": ({"kt_num_gpu_experts": 8}, PlacementError, "8 of 8 experts.*choose 0 to 7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused(
    tiny_folder: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from k26_plugins.sglang.hybrid import hybrid_settings

    changes, error, message = REFUSED[name]
    for argument, value in changes.items():
        monkeypatch.setattr(arguments, argument, value, raising=False)
    with pytest.raises(error, match=message):
        hybrid_settings(K26Config.from_path(tiny_folder))


@pytest.mark.skipif(find_spec("kt_kernel") is None, reason="kt-kernel is not installed in this environment")
def test_what_kt_run_starts_is_taken(tiny_folder: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line that KTransformers' own `kt run` makes, from nothing but a model and numbers, is accepted."""
    from kt_kernel.cli.commands.run import _build_sglang_command

    from k26_plugins.sglang.hybrid import hybrid_settings

    numbers = dict.fromkeys(inspect.signature(_build_sglang_command).parameters, 1)
    named = {"model_path": tiny_folder, "kt_method": "RAWINT4", "kt_gpu_prefill_threshold": 4096, "settings": {}}
    given = {
        **numbers,
        **named,
        "weights_path": None,
        "kt_numa_nodes": None,
        "extra_model_params": {},
        "extra_cli_args": [],
    }
    command = list(map(str, _build_sglang_command(**given)))
    flags_of_kt = [place for place, word in enumerate(command) if word.startswith("--kt-")]
    assert "--kt-enable-dynamic-expert-update" in command
    for place in flags_of_kt:
        value: Any = command[place + 1] if not command[place + 1].startswith("--") else True
        value = int(value) if value is not True and value.isdecimal() else value
        monkeypatch.setattr(arguments, command[place][2:].replace("-", "_"), value, raising=False)
    settings = hybrid_settings(K26Config.from_path(tiny_folder))
    assert settings is not None
    assert settings.uses.moves
    assert settings.streaming is not None
    assert settings.streaming.threshold == 4096


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="this SGLang reads its arguments before the plugin is there")
def test_two_halves_of_a_batch_are_refused_before_sglang_asks_for_more(tiny_folder: Path) -> None:
    """The plugin has to refuse before SGLang, which would ask for DP attention, and with DP attention the start would
    go on."""
    from sglang.srt.server_args import ServerArgs

    from k26_plugins.sglang.arguments import before_settling

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    command = ["--model-path", str(tiny_folder), "--device", "cpu", "--enable-two-batch-overlap"]
    settled: list[Any] = []
    before_settling(settled.append, ServerArgs.from_cli_args(parser.parse_args(command)))
    assert len(settled) == 1
    with_hybrid = ServerArgs.from_cli_args(parser.parse_args([*command, *hybrid_flags(tiny_folder, 4)]))
    with pytest.raises(ValueError, match=r"--enable-two-batch-overlap needs expert parallelism .*leave it out"):
        before_settling(settled.append, with_hybrid)
    assert len(settled) == 1


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="that of the newest SGLang")
def test_sglang_s_halves_of_a_batch_go_to_experts_by_an_all_to_all_alone() -> None:
    """SGLang's own operations of a layer, run without an all-to-all, hand the experts nothing. Once they do, there is
    no reason left to refuse --enable-two-batch-overlap."""
    from sglang.srt.batch_overlap.operations import _StateDict
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE

    state = _StateDict()
    state.update({"hidden_states_mlp_input": torch.zeros(2, 8), "topk_output": None})
    block = SimpleNamespace(ep_size=1, experts=SimpleNamespace(run_moe_core=lambda dispatch_output: dispatch_output))
    DeepseekV2MoE.op_dispatch_a(block, state)
    DeepseekV2MoE.op_dispatch_b(block, state)
    with pytest.raises(KeyError, match="dispatch_output"):
        DeepseekV2MoE.op_experts(block, state)


def test_memory_that_does_not_suffice_is_refused_before_loading(
    tiny_folder: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from k26_plugins.common.host import memory as host_memory
    from k26_plugins.sglang.hybrid import hybrid_settings

    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 10)
    with pytest.raises(HostMemoryError, match=r"4 experts of 2 layers on the CPU need .*raise --kt-num-gpu-experts"):
        hybrid_settings(K26Config.from_path(tiny_folder))


def test_a_cuda_graph_that_cannot_hold_the_run_is_refused(
    tiny_folder: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from k26_plugins.sglang.hybrid import hybrid_settings

    config = K26Config.from_path(tiny_folder)
    device_runtime.device_runtime.cache_clear()
    monkeypatch.setattr(device_runtime, "_loaded", list)
    with pytest.raises(ValueError, match=r"loaded no runtime of CUDA.* Add --disable-cuda-graph"):
        hybrid_settings(config)
    monkeypatch.setenv("K26_CPU_EXPERTS", "cpu")
    with pytest.raises(ValueError, match=r"K26_CPU_EXPERTS=cpu has no other way.*--disable-cuda-graph"):
        hybrid_settings(config)
    on_gpu.disable_cuda_graph = True
    settings = hybrid_settings(config)
    assert settings is not None
    assert settings.runtime is None
