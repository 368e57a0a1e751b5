"""Hybrid runs by SGLang's `--kt-…` flags: the real server with a CPU in the GPU's place, and the combinations refused."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench.deferred import deferring_model
from click.testing import CliRunner
from support import documented
from support.agreement import assert_same_distribution, assert_same_top, divergence
from support.doctor import doctor
from support.experts import error, inputs, judge, make_weights, route
from support.images import image_part, png, random_image
from support.native_sample import needs_compiler, needs_set
from support.pretended_device import PretendedDevice, be_late, compile_runtime
from support.server import Server
from support.sglang_server import (
    EAGER,
    HAS_ENTRY_POINT,
    IS_FORK,
    TWO_RANKS,
    boot_folder,
    first_tokens,
    generate,
    rows,
    serve,
)
from support.swarm import metric

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.experts import ExpertsError
from k26_plugins.common.experts.moving import INTERVAL, Uses
from k26_plugins.common.experts.native import threads
from k26_plugins.common.experts.native.threads import process_threads
from k26_plugins.common.experts.placement import PROFILE_FILE, PlacementError, Profile
from k26_plugins.common.host import device_runtime
from k26_plugins.common.host.cache_folder import cache_folder
from k26_plugins.common.host.device_runtime import DeviceRuntimeError
from k26_plugins.common.host.memory import HostMemoryError
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.checkpoint import TinySizes, make_tiny
from k26_plugins.sglang import compat

# Read when SGLang is imported, which nothing above does.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

pytestmark = pytest.mark.skipif(
    not (HAS_ENTRY_POINT or IS_FORK), reason="hybrid runs are checked on the newest SGLang and on KTransformers' fork"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inner size 256: kt-kernel wants 128 on each of two ranks."""
    folder = tmp_path_factory.mktemp("hybrid") / "tiny"
    make_tiny(folder, TinySizes(moe_intermediate_size=256))
    return folder


def flags(folder: Path, on_device: int) -> list[str]:
    return ["--kt-weight-path", str(folder), "--kt-method", "RAWINT4", "--kt-num-gpu-experts", str(on_device)]


@pytest.fixture(scope="module")
def half(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"K26_STREAM_FROM": "64", "K26_MOVE_EXPERTS": "1", **EAGER}
    arguments = [*flags(folder, 4), "--enable-metrics"]
    with serve(folder, tmp_path_factory.mktemp("half") / "log", *arguments, **settings) as server:
        yield server


def test_half_of_the_experts_on_each_side_give_the_reference_s_answers(half: Server, folder: Path) -> None:
    assert "4 of 8 experts of each layer on the device (the first)" in half.log.read_text()
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))
    answer = generate(half, prompt.tolist(), 1)
    assert re.search(r"of \d+ tokens [1-4] of the CPU's experts are streamed", half.log.read_text())
    reference = KimiK26(Checkpoint(folder), torch.float32)
    served = rows(answer["meta_info"]["input_top_logprobs"][1:])
    assert_same_distribution(served, reference.logprobs(prompt)[:-1])


def test_chat_and_images(half: Server) -> None:
    assert half.chat("Hello", max_tokens=4)["usage"]["completion_tokens"] > 0
    content = [image_part(png(random_image(100, 80))), {"type": "text", "text": "What?"}]
    assert half.chat(content, max_tokens=4)["usage"]["completion_tokens"] > 0


def test_verify_passes(half: Server, folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden.safetensors"
    command = ["golden", str(folder), "--prompts", str(prompts_file), "--out", str(out), "--answer-tokens", "4"]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    result = CliRunner().invoke(app, ["verify", "--url", half.url, "--golden", str(out)])
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(find_spec("kt_kernel") is None, reason="kt-kernel is not installed in this environment")
def test_two_ranks_with_kt_kernel_and_a_profile_answer_as_one(half: Server, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    for file in folder.iterdir():
        (tmp_path / "tiny" / file.name).symlink_to(file)
    Profile(10, [[0] * 8, [1, 5, 0, 5, 0, 0, 0, 4], [3, 0, 5, 0, 1, 1, 1, 1]]).save(tmp_path / "tiny" / PROFILE_FILE)
    command = documented.as_run(documented.HYBRID, tmp_path / "tiny")
    settings = {**TWO_RANKS, **EAGER, "K26_CPU_EXPERTS": "kt"}
    with serve(tmp_path / "tiny", tmp_path / "log", command=command, **settings) as server:
        log = server.log.read_text()
        assert f"by {PROFILE_FILE}, 85% of its uses" in log
        assert "on the CPU (kt)" in log
        # kt-kernel rounds activations to 8 bits, 1.3 % of an expert's output.
        assert_same_top(first_tokens(server), first_tokens(half), noise=0.15)


def test_experts_that_are_used_more_move_to_the_device(half: Server, folder: Path) -> None:
    """And a repeated prompt finds more of its experts there, with the same answer."""
    prompt = torch.randint(0, 256, (50,), generator=torch.Generator().manual_seed(1))
    reference = KimiK26(Checkpoint(folder), torch.float32).logprobs(prompt)[:-1]

    def hit_rate() -> float:
        return next(iter(metric(half, "k26_hybrid_hit_rate").values()), 0.0)

    rates = []
    for _ in range(3):
        time.sleep(INTERVAL + 1)
        answer = generate(half, prompt.tolist(), 1)
        assert_same_distribution(rows(answer["meta_info"]["input_top_logprobs"][1:]), reference)
        rates.append(hit_rate())
    assert "experts that are used more took a place on cpu" in half.log.read_text()
    assert rates[-1] > 0.5
    assert rates[-1] >= max(rates) - 1e-6


def test_deferred_experts_are_added_one_layer_later(folder: Path, tmp_path: Path) -> None:
    """As in the reference that defers, and not as in the one that does not."""
    arguments = [*flags(folder, 2), "--kt-max-deferred-experts-per-token", "1"]
    prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
    with serve(folder, tmp_path / "log", *arguments, **EAGER) as server:
        assert "--kt-max-deferred-experts-per-token 1 changes answers" in server.log.read_text()
        answer = generate(server, prompt.tolist(), 1)
    served = rows(answer["meta_info"]["input_top_logprobs"][1:])

    def median_kl(model: KimiK26) -> float:
        return divergence(served, model.logprobs(prompt)[:-1]).median().item()

    # Rounding may decide which of two experts of equal weight is deferred, which is seen in a few positions.
    to_deferring, to_exact = (
        median_kl(deferring_model(folder, 2, 1)),
        median_kl(KimiK26(Checkpoint(folder), torch.float32)),
    )
    assert to_deferring <= 5e-4
    assert to_exact >= 10 * to_deferring


def test_an_update_finds_moved_experts_and_leaves_what_graphs_hold() -> None:
    from k26_plugins.sglang.hybrid import HybridSettings, K26HybridScheme

    weights, slots = make_weights(8, 128, 64), list[int]()
    settings = HybridSettings(8, 3, None, "auto", None, None, None, Uses(logging.getLogger("moving"), moves=True))
    scheme, layer = K26HybridScheme("auto", settings), torch.nn.Module()
    layer.layer_id, layer.top_k = 1, 3  # type: ignore[assignment]
    loader = {"weight_loader": lambda *_, shard_id, expert_id: slots.append(expert_id)}
    scheme.create_weights(layer, 8, 128, 64, torch.bfloat16, **loader)

    def load() -> None:
        for module, ids in ((layer, scheme.placement.device_ids), (scheme.host, scheme.placement.host_ids)):
            for matrix in ("w13", "w2"):
                for part in ("packed", "scale"):
                    module.get_parameter(f"{matrix}_weight_{part}").data.copy_(
                        getattr(weights, f"{matrix}_{part}")[[*ids]]
                    )

    load()
    scheme.close()
    served = scheme.backend
    assert served is not None
    leaves, comes = scheme.placement.device_ids[1], scheme.placement.host_ids[2]
    served.exchange(leaves, comes)
    scheme.open()
    parameter: Any = layer.get_parameter("w2_weight_packed")
    parameter.weight_loader(parameter, weights.w2_packed[comes], "w2_weight_packed", shard_id="w2", expert_id=comes)
    assert slots == [1]
    load()
    scheme.close()
    assert scheme.backend is served
    x, (ids, topk_weights) = inputs(5, 128), route(5, 3, 8)
    assert error(served.apply(x, ids, topk_weights), judge(weights, x, ids, topk_weights)) <= 6e-3


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


@pytest.fixture
def arguments(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's own reading of a hybrid run's command line."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    command = ["--model-path", str(tiny_folder), "--device", "cpu", *flags(tiny_folder, 4)]
    arguments = ServerArgs.from_cli_args(parser.parse_args(command))
    monkeypatch.setattr(compat, "server_args", lambda: arguments)
    return arguments


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


needs_fork = pytest.mark.skipif(not IS_FORK, reason="`kt run` starts KTransformers' fork of SGLang, which is not here")


@needs_fork
def test_kt_run_starts_a_hybrid_run_that_answers_as_one_started_directly(
    half: Server, folder: Path, tmp_path: Path
) -> None:
    """KTransformers' command line as documented, on two ranks with the CPU in the GPUs' place."""
    command = [*documented.as_run(documented.KT_RUN, folder), "--attention-backend", "torch_native"]
    # What it keeps in the home it keeps for good; the compiled experts are those that are there.
    settings = {**TWO_RANKS, **EAGER, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(cache_folder().parent)}
    prompt = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    with serve(folder, tmp_path / "log", command=command, **settings) as server:
        assert "k26-plugins: hybrid run, 4 of 8 experts of each layer on the device" in server.log.read_text()
        found, expected = (
            rows(generate(one, prompt, 1)["meta_info"]["input_top_logprobs"][1:]) for one in (server, half)
        )
        assert_same_distribution(found, expected)
        assert_same_top(first_tokens(server), first_tokens(half))


@needs_fork
@pytest.mark.parametrize("is_on_path", [True, False])
def test_the_doctor_says_what_kt_run_would_start(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, is_on_path: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", boot_folder() if is_on_path else "")
    found = doctor("--checkpoint", str(tiny_folder), "--engine", "sglang", code=0 if is_on_path else 1)
    word, starts = ("active", "with") if is_on_path else ("NOT active: this SGLang has no plugins", "WITHOUT")
    assert found["sglang"]["detail"].startswith(f"sglang-kt 0.7.2: the plugin is {word}")
    assert f"`kt run` starts sglang-kt 0.7.2 {starts} the plugin" in found["ktransformers"]["detail"]
    if not is_on_path:
        line = f"{found['sglang']['fix']} && printenv PYTHONPATH"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        printed = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        )
        assert printed.stdout.strip() == boot_folder()


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="this SGLang reads its arguments before the plugin is there")
def test_two_halves_of_a_batch_are_refused_before_sglang_asks_for_more(tiny_folder: Path) -> None:
    """Namely DP attention, with which a start goes on."""
    from sglang.srt.server_args import ServerArgs

    from k26_plugins.sglang.arguments import before_settling

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    command = ["--model-path", str(tiny_folder), "--device", "cpu", "--enable-two-batch-overlap"]
    settled = []
    before_settling(settled.append, ServerArgs.from_cli_args(parser.parse_args(command)))
    assert len(settled) == 1
    with pytest.raises(ValueError, match=r"--enable-two-batch-overlap needs expert parallelism .*leave it out"):
        before_settling(settled.append, ServerArgs.from_cli_args(parser.parse_args([*command, *flags(tiny_folder, 4)])))
    assert len(settled) == 1


@pytest.mark.skipif(not HAS_ENTRY_POINT, reason="that of the newest SGLang")
def test_sglang_s_halves_of_a_batch_go_to_experts_by_an_all_to_all_alone() -> None:
    """Its own operations of a layer, without one: where they hand the experts something, the refusal has lost its reason."""
    from sglang.srt.batch_overlap.operations import _StateDict
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE

    state = _StateDict()
    state.update({"hidden_states_mlp_input": torch.zeros(2, 8), "topk_output": None})
    block = SimpleNamespace(ep_size=1, experts=SimpleNamespace(run_moe_core=lambda dispatch_output: dispatch_output))
    DeepseekV2MoE.op_dispatch_a(block, state)
    DeepseekV2MoE.op_dispatch_b(block, state)
    with pytest.raises(KeyError, match="dispatch_output"):
        DeepseekV2MoE.op_experts(block, state)


@pytest.mark.skipif(find_spec("kt_kernel") is None, reason="kt-kernel is not installed in this environment")
def test_what_kt_run_starts_is_taken(tiny_folder: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line that KTransformers' own `kt run` makes of nothing but a model and its numbers."""
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


def test_memory_that_does_not_suffice_is_refused_before_loading(
    tiny_folder: Path, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from k26_plugins.common.host import memory as host_memory
    from k26_plugins.sglang.hybrid import hybrid_settings

    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 10)
    with pytest.raises(HostMemoryError, match=r"4 experts of 2 layers on the CPU need .*raise --kt-num-gpu-experts"):
        hybrid_settings(K26Config.from_path(tiny_folder))


@pytest.fixture
def on_gpu(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same command line where torch finds a GPU."""
    monkeypatch.setattr(compat, "device_type", lambda: "cuda")
    arguments.disable_cuda_graph = False
    return arguments


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


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA: it brings no runtime")
def test_nvidia_s_runtime_has_what_is_called() -> None:
    """The library that torch has loaded, without a device: it refuses, in its own words, what it would do with one."""
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
    """By SGLang's scheduler, with the runtime of a pretended device, beside CUDA graphs."""
    from sglang.srt.managers.scheduler import Scheduler

    from k26_plugins.sglang import hybrid

    device = PretendedDevice(compile_runtime(tmp_path))
    monkeypatch.setattr(hybrid, "device_runtime", lambda: device.runtime)
    answered: list[object] = []
    monkeypatch.setattr(Scheduler, "process_batch_result", lambda self, batch, result: answered.append(result))
    settings = hybrid.hybrid_settings(K26Config.from_path(tiny_folder))
    assert settings is not None
    assert settings.runtime is device.runtime
    monkeypatch.setattr(threads, "_process_threads", None)  # of a process of its own, as it were
    result, waited = SimpleNamespace(), []
    result.copy_done = SimpleNamespace(synchronize=lambda: waited.append(result))
    Scheduler.process_batch_result(None, None, result)
    assert answered == waited == [result]
    be_late(device, process_threads())
    with pytest.raises(ExpertsError, match="restart the server"):
        Scheduler.process_batch_result(None, None, result)
    assert answered == [result]
