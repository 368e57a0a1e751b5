"""What can be held without a server: registration, configuration, tokenizer, pixels, the choice of experts."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_names import read_snapshot
from support import sglang_foreign_kernels
from support.experts import error, inputs, judge, route
from support.layouts import OTHER, PUBLISHED, make
from support.made_ready import record
from support.platforms import SGLANG_PLATFORMS
from support.registration import assert_all_or_nothing
from support.remote_code import plant
from support.sameness import SIZES, TEXTS, image_of, media_line, recorded
from support.sglang_server import HAS_ENTRY_POINT, boot_folder
from support.versions import wrong_entries
from torch.utils._python_dispatch import TorchDispatchMode

from k26_plugins.common.adapters.engine import EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.registration import Registration
from k26_plugins.common.checkpoint import Checkpoint, expert_name
from k26_plugins.common.experts import ExpertWeights
from k26_plugins.common.experts.cpu import CpuExperts
from k26_plugins.common.experts.loading import load_experts
from k26_plugins.common.model.config import ARCHITECTURE, ConfigError
from k26_plugins.common.prompt.hf_tokenizer import KimiTokenizerFast
from k26_plugins.common.tiny.checkpoint import make_tiny
from k26_plugins.sglang import compat, compat_loading, names, probe, register

# Read when SGLang is imported, which nothing above does.
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
register()


class FusedMoE(torch.nn.Module):
    """SGLang finds the experts' format by the name of the layer's class."""


def sglang_utils() -> Any:
    from sglang.srt.utils import hf_transformers_utils

    return hf_transformers_utils


def test_registration_takes_the_in_tree_classes_place_and_no_others() -> None:
    register()  # SGLang runs it in every process
    from sglang.srt.models.llama import LlamaForCausalLM
    from sglang.srt.models.registry import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls([ARCHITECTURE])
    assert model.__module__ == "k26_plugins.sglang.model"
    assert issubclass(model, compat.in_tree_model().KimiK25ForConditionalGeneration)
    assert ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])[0] is LlamaForCausalLM


def test_the_probe_imports_the_models_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang's registry only logs that it cannot: by everything that registration does the plugin is active."""

    def told() -> dict[str, Any]:
        probe.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    assert told()["active"]
    monkeypatch.setitem(sys.modules, "k26_plugins.sglang.models.entry", None)
    state = told()
    assert not state["active"]
    assert "the model's class cannot be imported" in state["why_not"]


def test_a_failing_registration_leaves_sglang_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "register_models", lambda changes, package: 1 / 0)
    register()
    assert "k26-plugins is not active" in caplog.text


@pytest.mark.skipif(
    not HAS_ENTRY_POINT, reason="SGLang 0.5.10 has no registry of hooks, and calls the adapter otherwise"
)
def test_registration_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without each name that it looks up, in turn: SGLang's registries, hooks and variables are as they were."""
    import transformers.dynamic_module_utils as doors
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ServerArgs

    configs = compat._config_registry()
    processors = compat.private(names.CUSTOMIZED_PROCESSORS)
    target = next(iter(name for name in HookRegistry._hooks if name.endswith(".get_tokenizer")))
    for registry, key in (
        (ModelRegistry.models, ARCHITECTURE),
        (configs, compat.MODEL_TYPE),
        (processors, compat.MODEL_TYPE),
    ):
        monkeypatch.setitem(registry, key, "SGLang's own")
    monkeypatch.setitem(HookRegistry._hooks, target, [])
    monkeypatch.delenv(compat.MEDIA_VARIABLE)
    monkeypatch.delenv(compat.MODELS_VARIABLE)
    for name in ("resolve_trust_remote_code", "get_class_from_dynamic_module"):
        monkeypatch.setattr(doors, name, lambda: None)
    monkeypatch.setattr(ServerArgs, "resolve_once", lambda arguments: None)

    def state() -> tuple[Any, ...]:
        return (
            ModelRegistry.models[ARCHITECTURE], dict(configs), dict(processors),
            list(HookRegistry._hooks[target]), os.environ.get(compat.MEDIA_VARIABLE),
            os.environ.get(compat.MODELS_VARIABLE), vars(ServerArgs)["resolve_once"], doors.resolve_trust_remote_code,
            doors.get_class_from_dynamic_module,
        )  # fmt: skip

    before, looked_up = state(), assert_all_or_nothing(compat, register, state, caplog)
    assert looked_up >= 2
    # The last try had every name.
    assert not any(one == other for one, other in zip(before, state(), strict=True))


def test_sglangs_own_class_serves_where_ours_lacks_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the import of our class needs it, not the registration of the plugin; with K26_STRICT=1 the start ends."""
    from sglang.srt.models.registry import import_model_classes

    in_tree = compat.in_tree_model().KimiK25ForConditionalGeneration

    def forget() -> None:
        for name in ("model", "models.entry"):
            monkeypatch.delitem(sys.modules, f"k26_plugins.sglang.{name}", raising=False)

    monkeypatch.delattr(sys.modules[in_tree.__module__], in_tree.__name__)
    monkeypatch.setattr("k26_plugins.sglang.logger.propagate", True)
    monkeypatch.setattr(logging.getLogger("sglang"), "propagate", True)
    forget()
    # The function within what SGLang remembers of a package.
    found = inspect.unwrap(import_model_classes)
    assert found("k26_plugins.sglang.models") == {}
    assert "SGLang's own model class serves" in caplog.text
    forget()
    monkeypatch.setenv("K26_STRICT", "1")
    with pytest.raises(SystemExit, match=in_tree.__name__):
        found("k26_plugins.sglang.models")


def test_a_name_that_sglang_lost_is_one_clear_error() -> None:
    name = EngineName("sglang.nothing", "Here", why="test it", remove_when="never")
    with pytest.raises(UnsupportedEngineError, match=r"sglang .* has no sglang.nothing.Here.*checked on sglang"):
        compat.private(name)


def test_no_file_of_the_checkpoint_is_executed(tiny_folder: Path, tmp_path: Path) -> None:
    """By the configuration, the tokenizer and the processor, which every process reads with the flag's value."""
    utils = sglang_utils()
    mark = plant(tiny_folder, tmp_path / "DIR")
    for read in (utils.get_config, utils.get_tokenizer, utils.get_processor):
        read(str(tmp_path / "DIR"), trust_remote_code=True)
    assert not mark.exists(), mark.read_text()


def test_the_environment_variable_of_0_5_10_makes_it_active(tmp_path: Path) -> None:
    """And another sitecustomize on the path runs too."""
    (tmp_path / "sitecustomize.py").write_text("print('the other runs')\n")
    code = (
        "import sglang.srt.utils.hf_transformers_utils as utils, sglang.srt.managers.detokenizer_manager as manager\n"
        "from k26_plugins.sglang import compat\n"
        "print(compat._config_registry()['kimi_k25'].__module__, manager.get_tokenizer is utils.get_tokenizer)"
    )
    path = os.pathsep.join((boot_folder(), str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.splitlines()[0] == "the other runs"
    assert done.stdout.splitlines()[-1] == "k26_plugins.sglang.config True"


def test_the_configuration_is_understood_in_the_hubs_spelling(tiny_folder: Path, tmp_path: Path) -> None:
    """Without the names that SGLang's own class knows, which it would fill with the published model's sizes."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "hub"))
    content = json.loads((folder / "config.json").read_text())
    vision = content["vision_config"]
    content["vision_config"] = {name: value for name, value in vision.items() if f"vt_{name}" not in vision}
    (folder / "config.json").write_text(json.dumps(content))
    found = sglang_utils().get_config(str(folder), trust_remote_code=False)
    assert type(found).__name__ == "KimiK25Config"
    assert found.vision_config.hidden_size == vision["vt_hidden_size"] == 144
    assert found.vision_config.num_hidden_layers == 2


def test_a_configuration_of_another_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["kv_lora_rank"] = -1
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"text_config.kv_lora_rank"):
        sglang_utils().get_config(str(folder), trust_remote_code=False)


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_is_left_to_sglang(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """By SGLang's own reading of the configuration, with the reason in one line."""
    folder = make(OTHER[name][0], tiny_folder, tmp_path / "made")
    config = sglang_utils().get_config(str(folder), trust_remote_code=False)
    assert not config.k26_published_layout
    assert caplog.text.count("the engine's own code serves it") == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layout_is_the_cores(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = make(PUBLISHED[name], tiny_folder, tmp_path / "made")
    assert sglang_utils().get_config(str(folder), trust_remote_code=False).k26_published_layout


def test_token_ids_are_those_of_vllm(tiny_folder: Path) -> None:
    tokenizer = sglang_utils().get_tokenizer(str(tiny_folder), trust_remote_code=False)
    assert isinstance(tokenizer, KimiTokenizerFast)
    for text in TEXTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids == recorded()["prompts"][text]


def test_another_models_tokenizer_is_sglangs(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    assert not isinstance(sglang_utils().get_tokenizer(str(tmp_path)), KimiTokenizerFast)


def test_a_tokenizer_json_alone_is_left_to_sglang(tiny_folder: Path, tmp_path: Path) -> None:
    """Beside `tiktoken.model` it changes nothing."""
    folder = tmp_path / "DIR"
    shutil.copytree(tiny_folder, folder)
    settings = (folder / "tokenizer_config.json").read_text()
    save_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(settings)
    assert isinstance(sglang_utils().get_tokenizer(str(folder)), KimiTokenizerFast)
    (folder / "tiktoken.model").unlink()
    save_tokenizer(folder)
    assert not isinstance(sglang_utils().get_tokenizer(str(folder)), KimiTokenizerFast)


def save_tokenizer(folder: Path) -> None:
    """transformers' files of a tokenizer of one word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))).save_pretrained(folder)


def test_pixels_are_those_of_vllm(tiny_folder: Path) -> None:
    """Through SGLang's own `get_processor`, called as its code for this model calls it."""
    processor = sglang_utils().get_processor(str(tiny_folder), trust_remote_code=False)
    for size in SIZES:
        image = image_of(size)
        medias = [{"type": "image", "image": image}]
        count = processor.media_processor.media_tokens_calculator(medias[0])
        found = processor(text=["<|media_pad|>" * count], medias=medias, padding=True, return_tensors="pt")
        assert found["input_ids"].tolist() == [[277] * count]
        line = media_line(found["pixel_values"], found["grid_thws"][0])
        assert line == recorded()["media"][f"{size[0]}x{size[1]}"]


@pytest.fixture
def media_processor(tiny_folder: Path) -> Any:
    """SGLang's choice for this model, built as its tokenizer manager builds it."""
    from sglang.srt.managers import multimodal_processor
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    arguments = ServerArgs(model_path=str(tiny_folder), device="cpu")
    set_global_server_args_for_scheduler(arguments)
    multimodal_processor.import_processors("sglang.srt.multimodal.processors")
    multimodal_processor.import_processors(os.environ[compat.MEDIA_VARIABLE], overwrite=True)
    processor = sglang_utils().get_processor(str(tiny_folder), trust_remote_code=False)
    config = sglang_utils().get_config(str(tiny_folder), trust_remote_code=False)
    return multimodal_processor.get_mm_processor(config, arguments, processor, None)


def test_sglangs_media_class_takes_the_core_s_pixels_on_any_device(
    media_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself it would decode and resize on a GPU, by other arithmetic."""
    assert not media_processor.gpu_image_decode
    if not hasattr(media_processor._processor, "_gpu_call"):
        pytest.skip("SGLang 0.5.10 has no GPU preprocessing for this model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = media_processor._processor(text=["a<|media_pad|>b"], images=[image_of((640, 480))])
    assert media_line(found["pixel_values"], found["image_grid_thw"][0]) == recorded()["media"]["640x480"]


def test_another_media_package_of_the_user_s_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compat.MEDIA_VARIABLE, "theirs")
    with pytest.raises(UnsupportedEngineError, match=r"SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE is 'theirs'"):
        compat.register_media(Registration(), "k26_plugins.sglang.media")


def test_the_router_s_logits_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The in-tree gate gives bfloat16 on a CPU."""
    from k26_plugins.sglang.router import use_float32_logits

    gate = torch.nn.Module.__new__(compat.router_gate())
    torch.nn.Module.__init__(gate)
    gate.weight = torch.nn.Parameter(torch.randn(8, 64).bfloat16(), requires_grad=False)
    gate.quant_method = None
    use_float32_logits(torch.nn.ModuleList([gate]))
    in_tree = torch.randn(3, 8).bfloat16()
    monkeypatch.setattr(compat.router_gate(), "forward", lambda self, x: in_tree)
    hidden_states = torch.randn(3, 64).bfloat16()
    expected = hidden_states.double() @ gate.weight.double().T
    torch.testing.assert_close(gate(hidden_states).double(), expected, rtol=1e-5, atol=1e-5)
    assert not hasattr(gate, "quant_method")


class CountedProducts(TorchDispatchMode):
    """How many matrix products torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.mm.dtype, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(find_spec("sglang.srt.arg_groups") is None, reason="this SGLang has no platform to pretend")
def test_on_rocm_the_router_computes_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is no CPU, and without data: what SGLang's own gate gives there is bfloat16."""
    from sglang.srt.runtime_context import override_platform

    from k26_plugins.sglang.router import K26Gate

    gate = K26Gate.__new__(K26Gate)
    torch.nn.Module.__init__(gate)
    gate.weight = torch.nn.Parameter(torch.empty(8, 64, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    gate.tiny_router_gemm_max_tokens = -1
    settings = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))
    monkeypatch.setattr("sglang.srt.models.deepseek_v2.get_exec", lambda: settings)
    hidden_states = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    with override_platform(**SGLANG_PLATFORMS["gfx942"]):
        with CountedProducts() as in_tree:
            assert compat.router_gate().forward(gate, hidden_states).dtype == torch.bfloat16  # type: ignore[attr-defined]
        with CountedProducts() as ours:
            assert gate(hidden_states).dtype == torch.float32
    assert ours.count == in_tree.count == 1


class _Runner:
    """A value of `--moe-runner-backend`, as SGLang resolves it."""

    def __init__(self, name: str) -> None:
        from sglang.srt.layers.moe.utils import MoeRunnerBackend

        self.backend = MoeRunnerBackend(name)

    def __call__(self) -> Any:
        return self.backend


def quant_config(folder: Path) -> Any:
    """SGLang's own reading of the checkpoint's quantization."""
    settings = json.loads((folder / "config.json").read_text())["text_config"]["quantization_config"]
    return compat.compressed_tensors_config().from_config(settings)  # type: ignore[attr-defined]


def layer_of(intermediate_size: int = 64) -> FusedMoE:
    """A layer with the sizes that SGLang gives it before it asks for its scheme."""
    layer = FusedMoE()
    layer.num_local_experts, layer.hidden_size, layer.intermediate_size_per_partition = 8, 128, intermediate_size
    return layer


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
"""A layer's size, the all-to-all, --load-format, which of the core's experts cannot serve it, and what is said."""


@pytest.mark.parametrize("name", CANNOT)
def test_what_the_core_cannot_serve_is_asked_before_weights_are_created(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """By name it is one error; otherwise the layer is SGLang's."""
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

    monkeypatch.setattr(compat, "moe_runner_backend", _Runner("auto"))
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

    monkeypatch.setattr(compat, "moe_runner_backend", _Runner(runner))
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
"""Flags, K26_EXPERTS, the runner that SGLang settles on, and the experts that serve."""


@pytest.mark.skipif(
    find_spec("sglang.srt.arg_groups") is None, reason="this SGLang resolves otherwise, and has no B200 rule"
)
@pytest.mark.parametrize("name", BLACKWELL)
def test_what_sglang_chooses_on_blackwell_stands(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By SGLang's own rule on a platform that says it is one: the documented command starts there."""
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
    arguments._quantization_explicitly_unset = False  # what an earlier step notes
    with override_platform(is_sm100=True):
        settled = overrides._deepseek_moe_quant_resolution(overrides.resolving_view(arguments))
    found = settled.get("moe_runner_backend", arguments.moe_runner_backend)
    assert found == runner
    # As in SGLang's other processes.
    arguments = pickle.loads(pickle.dumps(arguments))
    monkeypatch.setattr(compat, "server_args", lambda: arguments)
    monkeypatch.setattr(compat, "moe_runner_backend", _Runner(found))
    assert chosen_backend(hybrid="--kt-weight-path" in flags) == expected


@pytest.mark.skipif(
    not HAS_ENTRY_POINT, reason="0.5.10 settles its arguments while it is imported: flags are the user's"
)
@pytest.mark.parametrize("name", ["s3://bucket/kimi", "moonshotai/Kimi-K2.6", "downloaded/before"])
def test_the_parsers_and_the_tokenizer_of_a_model_that_is_not_on_the_hub(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of an object store and of ModelScope, by the libraries of theirs that SGLang asks."""
    from sglang.srt.server_args import ServerArgs

    from k26_plugins.sglang.arguments import before_settling

    cache = tmp_path / "modelscope"
    (cache / "downloaded").mkdir(parents=True)
    (cache / "downloaded/before").symlink_to(tiny_folder)

    class ObjectStorage:
        def __init__(self, model_path: str, dst: str) -> None:
            assert model_path == name
            self.folder = dst

        def pull_files(self, allowed: Any, ignored: Any) -> None:
            assert "*.safetensors" in ignored
            shutil.copytree(tiny_folder, self.folder, ignore=shutil.ignore_patterns(*ignored))

        def __exit__(self, *error: Any) -> None: ...

    def download(model_id: str, file_path: str, revision: str | None) -> str:
        assert model_id == "moonshotai/Kimi-K2.6"
        return str(tiny_folder / file_path)

    for module, members in {
        "runai_model_streamer": {"ObjectStorageModel": ObjectStorage},
        "modelscope": {"model_file_download": download},
        "modelscope.utils.file_utils": {"get_model_cache_root": lambda: str(cache)},
    }.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**members))
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path))
    if "://" not in name:
        monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    arguments = ServerArgs(model_path=name)
    before_settling(lambda given: None, arguments)
    assert arguments.tool_call_parser == arguments.reasoning_parser == "kimi_k2"
    if "://" in name:
        tokenizer = sglang_utils().get_tokenizer(name)
        assert isinstance(tokenizer, KimiTokenizerFast)


def test_two_choices_by_hand_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SGLang does not tell a flag from its own choice, the variable is what was surely given."""
    from k26_plugins.sglang.experts import chosen_backend

    monkeypatch.setattr(compat, "moe_runner_backend", _Runner("marlin"))
    monkeypatch.setenv("K26_EXPERTS", "reference")
    monkeypatch.setattr(compat, "given_runner", lambda: "marlin")
    with pytest.raises(ValueError, match="choose different experts"):
        chosen_backend(hybrid=False)
    monkeypatch.setattr(compat, "given_runner", lambda: None)
    assert chosen_backend(hybrid=False) == "reference"


def test_the_snapshot_says_what_this_release_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """By reading its files it was made; here the engine itself is asked."""
    for name in sglang_foreign_kernels.NAMES:
        if not hasattr(torch.ops.sgl_kernel, name):
            monkeypatch.setattr(torch.ops.sgl_kernel, name, None, raising=False)
    snapshot = read_snapshot(compat.distribution()[0])[compat.sglang_version()]
    assert wrong_entries(snapshot) == {}


@pytest.mark.skipif(find_spec("transformers.models.kimi_k25") is None, reason="this transformers has no such classes")
def test_prompts_and_images_can_be_left_to_sglang(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, the other stays ours; no file of the checkpoint is needed for either."""
    utils = sglang_utils()
    monkeypatch.setenv("K26_PROMPTS", "engine")
    assert not isinstance(utils.get_tokenizer(str(tiny_folder)), KimiTokenizerFast)
    assert type(utils.get_processor(str(tiny_folder))).__module__ == "k26_plugins.sglang.processor"
    monkeypatch.delenv("K26_PROMPTS")
    monkeypatch.setenv("K26_MEDIA", "engine")
    processor = utils.get_processor(str(tiny_folder))
    assert type(processor).__module__.startswith("transformers.")
    assert isinstance(processor.tokenizer, KimiTokenizerFast)


@pytest.mark.parametrize("on_device", [None, 0, 3])
def test_a_layer_s_experts_are_loaded_and_updated(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_device: int | None
) -> None:
    """By the names of the checkpoint, on one side or on both of a hybrid run; an update comes in two halves."""
    from k26_plugins.common.experts.moving import Uses
    from k26_plugins.sglang.experts import K26MoEScheme, experts_of
    from k26_plugins.sglang.hybrid import HybridSettings, K26HybridScheme

    make_tiny(tmp_path / "other", seed=1)
    old, new = Checkpoint(tiny_folder), Checkpoint(tmp_path / "other")
    seen = record(monkeypatch, CpuExperts)
    text = old.config.text
    experts = text.n_routed_experts
    if on_device is None:
        scheme = K26MoEScheme("cpu")
    else:
        uses = Uses(logging.getLogger("moving"), moves=False)
        scheme = K26HybridScheme("cpu", HybridSettings(experts, on_device, None, "native", None, None, None, uses))
    layer = FusedMoE()
    layer.layer_id, layer.num_experts, layer.top_k = 1, experts, 2
    layer.moe_ep_size, layer.moe_tp_size, layer.moe_tp_rank = 1, 1, 0
    unmoved = SimpleNamespace(init_expert_location="trivial", enable_eplb=False, ep_num_redundant_experts=0)
    monkeypatch.setattr(compat, "server_args", lambda: unmoved)
    layer.scheme = scheme
    sizes = (experts, text.hidden_size, text.moe_intermediate_size)
    scheme.create_weights(layer, *sizes, torch.bfloat16, weight_loader=load_whole)

    def load(checkpoint: Checkpoint, names: list[str]) -> None:
        weights = ((name, checkpoint.tensor(name)) for name in names)
        assert not list(load_experts(weights, old.config, experts_of(layer)))

    x, (ids, topk_weights) = inputs(20, text.hidden_size), route(20, 2, experts)

    def assert_computed(checkpoint: Checkpoint) -> None:
        out = torch.empty_like(x)
        scheme.compute(out, x, topk_weights, ids)
        assert error(out, judge(weights_of(checkpoint, 1), x, ids, topk_weights)) <= 6e-3

    names = [name for name, spec in old.table.items() if spec.expert is not None and spec.layer == 1]
    load(old, names)
    scheme.process_weights_after_loading(layer)
    assert_computed(old)
    # The device's experts were made ready for batches of every size.
    here, ids_of = (experts, None) if on_device is None else (on_device, experts)
    assert [(number, *batches[:3]) for number, batches in seen] == [(here, 2, ids_of, torch.bfloat16)] * (here > 0)
    load(new, names[: len(names) // 2])
    load(new, names[len(names) // 2 :])
    scheme.process_weights_after_loading(layer)  # 0.5.10 ends each update with it
    assert_computed(new)
    scheme.restore_weights_before_loading(layer)  # and later releases begin with this
    load(old, names)
    scheme.process_weights_after_loading(layer)
    assert_computed(old)


def load_whole(param: Any, weight: torch.Tensor, name: str, shard_id: str, expert_id: int) -> None:
    """SGLang's loader of a parameter, on one rank."""
    target = param.data[expert_id]
    if shard_id != "w2":
        target = target.chunk(2)[shard_id == "w3"]
    target.copy_(weight)


def weights_of(checkpoint: Checkpoint, layer: int) -> ExpertWeights:
    def stacked(projections: tuple[str, ...], part: str) -> torch.Tensor:
        return torch.stack(
            [
                torch.cat([checkpoint.tensor(expert_name(layer, expert, name, part)) for name in projections])
                for expert in range(checkpoint.config.text.n_routed_experts)
            ]
        )

    return ExpertWeights(
        *(stacked(names, part) for names in (("gate", "up"), ("down",)) for part in ("packed", "scale"))
    )
