"""Tests of which experts serve a layer, the core's or SGLang's own, by flags, K26_EXPERTS and the platform."""

from __future__ import annotations

import argparse
import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.sglang_parts import FusedMoE, Runner

from k26_plugins.sglang import compat, compat_loading

CANNOT = {
    "DeepEP": (64, "deepep", "auto", "cpu", "--moe-a2a-backend deepep hands over tokens sorted by expert"),
    "a device": (
        64,
        "none",
        "auto",
        "triton",
        "triton is not, because the Triton kernels run on CUDA and ROCm GPUs, not on cpu",
    ),
    "sizes": (48, "none", "auto", "cpu", "tensor parallelism leaves 48 of moe_intermediate_size"),
    "repacked": (64, "none", "presharded", "cpu", "--load-format presharded keeps weights as one backend"),
}
"""(The layer's intermediate size, --moe-a2a-backend, --load-format, the core's backend that cannot serve the layer, the
reason in the error) of each case."""


@pytest.mark.parametrize("name", CANNOT)
def test_what_the_core_cannot_serve_is_asked_before_weights_are_created(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """If K26_EXPERTS names a backend that cannot serve the layer, an error says so; else SGLang's experts serve."""
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    from k26_plugins.common.experts import ExpertsError
    from k26_plugins.sglang.experts import core_serves

    size, all_to_all, load_format, backend, said = CANNOT[name]
    monkeypatch.setattr(compat_loading, "load_format", lambda: load_format)
    monkeypatch.setattr(compat, "moe_all_to_all", lambda: MoeA2ABackend(all_to_all))
    with pytest.raises(ExpertsError, match=rf"experts \({backend}\) cannot serve here: {said}.*unset K26_EXPERTS"):
        core_serves(layer_of(size), backend, by_name=True)
    assert not core_serves(layer_of(size), backend, by_name=False)
    assert f"SGLang's own INT4 experts are kept; the core's cannot serve here: {said}" in caplog.text


def test_routed_experts_get_our_scheme(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from k26_plugins.sglang.experts import K26MoEScheme, chosen_backend, use_core_experts

    monkeypatch.setattr(compat, "moe_runner_backend", Runner("auto"))
    monkeypatch.setattr(compat, "given_runner", lambda: "auto")
    monkeypatch.setattr(compat_loading, "load_format", lambda: "auto")
    ours, untouched = quant_config(tiny_folder), quant_config(tiny_folder)
    use_core_experts(ours, chosen_backend(hybrid=False), K26MoEScheme, by_name=False)
    scheme = ours.get_moe_scheme(layer_of(), layer_name="model.layers.1.mlp.experts")
    assert isinstance(scheme, K26MoEScheme)
    assert isinstance(ours, compat.compressed_tensors_config())
    assert type(untouched) is compat.compressed_tensors_config()


@pytest.mark.parametrize("runner", ["marlin", "triton"])
def test_sglangs_own_experts_stay_selectable(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, runner: str) -> None:
    from k26_plugins.common.settings import EXPERTS
    from k26_plugins.sglang.experts import K26MoEScheme, chosen_backend, use_core_experts

    monkeypatch.setattr(compat, "moe_runner_backend", Runner(runner))
    monkeypatch.setattr(compat, "given_runner", lambda: runner)
    config = quant_config(tiny_folder)
    use_core_experts(config, chosen_backend(hybrid=False), K26MoEScheme, by_name=False)
    scheme = config.get_moe_scheme(FusedMoE(), layer_name="model.layers.1.mlp.experts")
    assert type(scheme).__module__.startswith("sglang.")
    with pytest.raises(ValueError, match=r"hybrid run.*leave out --moe-runner-backend"):
        chosen_backend(hybrid=True)
    monkeypatch.setenv(EXPERTS.variable, "cpu")
    with pytest.raises(ValueError, match=rf"K26_EXPERTS=cpu and --moe-runner-backend {runner}"):
        chosen_backend(hybrid=False)


BLACKWELL: dict[str, tuple[list[str], str | None, str, str]] = {
    "no flag": ([], None, "flashinfer_trtllm", "engine"),
    "the engine's by name": ([], "engine", "flashinfer_trtllm", "engine"),
    "the core's by name": ([], "triton", "triton", "triton"),
    "a runner": (["--moe-runner-backend", "marlin"], None, "marlin", "engine"),
    "that runner": (["--moe-runner-backend", "flashinfer_trtllm"], None, "flashinfer_trtllm", "engine"),
    "a hybrid run": (["--kt-weight-path", "DIR", "--kt-num-gpu-experts", "4"], None, "triton", "auto"),
}
"""(Flags, K26_EXPERTS, the runner on which SGLang settles, the experts that serve) of each case."""


@pytest.mark.skipif(
    find_spec("sglang.srt.arg_groups") is None, reason="this SGLang resolves otherwise, and has no B200 rule"
)
@pytest.mark.parametrize("name", BLACKWELL)
def test_what_sglang_chooses_on_blackwell_stands(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """SGLang's own rule is asked on a pretended Blackwell platform: the runner that it chooses stands unless
    K26_EXPERTS or a hybrid run asks for the core's experts, so that the documented command starts there."""
    from sglang.srt.arg_groups import overrides
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs

    from k26_plugins.sglang.arguments import before_settling
    from k26_plugins.sglang.experts import chosen_backend

    flags, experts, runner, expected = BLACKWELL[name]
    if experts is not None:
        monkeypatch.setenv("K26_EXPERTS", experts)
    monkeypatch.setattr(compat, "on_gpu", lambda arguments: True)
    monkeypatch.setattr(compat, "device_type", lambda: "cuda")
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = ServerArgs.from_cli_args(parser.parse_args(["--model-path", str(tiny_folder), *flags]))
    before_settling(lambda given: None, arguments)
    arguments._quantization_explicitly_unset = False  # an earlier step of SGLang's would set it
    with override_platform(is_sm100=True):
        settled = overrides._deepseek_moe_quant_resolution(overrides.resolving_view(arguments))
    found = settled.get("moe_runner_backend", arguments.moe_runner_backend)
    assert found == runner
    # SGLang's other processes get the arguments pickled.
    arguments = pickle.loads(pickle.dumps(arguments))
    monkeypatch.setattr(compat, "server_args", lambda: arguments)
    monkeypatch.setattr(compat, "moe_runner_backend", Runner(found))
    assert chosen_backend(hybrid="--kt-weight-path" in flags) == expected


def test_two_choices_by_hand_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner flag and K26_EXPERTS that choose different experts are an error. If SGLang does not tell a given flag
    from its own choice, K26_EXPERTS decides, because only the variable was surely given."""
    from k26_plugins.sglang.experts import chosen_backend

    monkeypatch.setattr(compat, "moe_runner_backend", Runner("marlin"))
    monkeypatch.setenv("K26_EXPERTS", "reference")
    monkeypatch.setattr(compat, "given_runner", lambda: "marlin")
    with pytest.raises(ValueError, match="choose different experts"):
        chosen_backend(hybrid=False)
    monkeypatch.setattr(compat, "given_runner", lambda: None)
    assert chosen_backend(hybrid=False) == "reference"


def quant_config(folder: Path) -> Any:
    """Return SGLang's own reading of the checkpoint's quantization configuration."""
    settings = json.loads((folder / "config.json").read_text())["text_config"]["quantization_config"]
    return compat.compressed_tensors_config().from_config(settings)


def layer_of(intermediate_size: int = 64) -> FusedMoE:
    """Return a layer with the sizes that SGLang sets before it asks for the layer's scheme."""
    layer: Any = FusedMoE()
    layer.num_local_experts, layer.hidden_size, layer.intermediate_size_per_partition = 8, 128, intermediate_size
    return layer
