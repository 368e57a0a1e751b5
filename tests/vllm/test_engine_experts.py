"""Tests of the check that vLLM's own experts pass before they serve.

vLLM's real layers on the CPU are checked as they are, with wrong kernels, and with a method that the check does not
know.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import dense, error, inputs, judge, route
from support.live_bytes import LiveBytes
from support.made_ready import record
from vllm.config import VllmConfig, set_current_vllm_config

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.checkpoint.mapped import mapped_tensors
from k26_plugins.common.experts import BACKENDS, ExpertsError, ExpertWeights
from k26_plugins.common.experts.engine_test import BATCHES, EngineTest, files_read
from k26_plugins.common.experts.loading import ExpertsOfLayer, load_experts
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.reference.decoder import MoE
from k26_plugins.vllm import compat
from k26_plugins.vllm.engine_experts import watch_engine_experts
from k26_plugins.vllm.experts import K26ExpertsMethod

fused_moe = import_module("vllm.model_executor.layers.fused_moe")
if not hasattr(fused_moe, "FusedMoEFactory"):
    pytest.skip("this vLLM makes its layers otherwise", allow_module_level=True)
cpu_moe = import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
COMPRESSED = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
wna16 = import_module(f"{COMPRESSED}.compressed_tensors_moe_wna16")

KERNEL = r"\w*CPUUnquantizedExperts"
"""The name of vLLM's class for bfloat16 experts, which differs between CPUs with AMX and without."""


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from vllm.distributed import destroy_distributed_environment, init_distributed_environment
    from vllm.distributed.parallel_state import destroy_model_parallel, initialize_model_parallel

    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('rank') / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr("k26_plugins.vllm.logger.propagate", True)
    caplog.set_level(logging.INFO, "vllm.k26_plugins")
    return caplog


class Model(torch.nn.Module):
    """The model's layers of experts as vLLM makes them, under the numbers that they have in the model."""

    def __init__(self, config: K26Config, quant_config: Any = None) -> None:
        super().__init__()
        text = config.text
        self.layers = torch.nn.ModuleDict()
        with vllms_dtype():
            for number in range(text.first_k_dense_replace, text.num_hidden_layers):
                made = fused_moe.FusedMoEFactory(
                    num_experts=text.n_routed_experts,
                    top_k=text.num_experts_per_tok,
                    hidden_size=text.hidden_size,
                    intermediate_size=text.moe_intermediate_size,
                    quant_config=quant_config,
                    prefix=f"{id(self)}.layers.{number}.mlp.experts",
                )
                self.layers[str(number)] = torch.nn.ModuleDict({"experts": made})

    def experts(self) -> dict[int, Any]:
        """Return vLLM's modules that hold the experts, by the layer's number."""
        names = {name: module for name, module in self.named_modules() if hasattr(module, "quant_method")}
        return {int(name.split(".")[1]): module for name, module in names.items()}


@contextmanager
def vllms_dtype() -> Iterator[None]:
    """Make bfloat16 torch's default dtype, as vLLM does while it makes and loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def config(tiny_folder: Path) -> K26Config:
    return K26Config.from_path(tiny_folder)


def finish(model: Model) -> None:
    """Do what vLLM's loaders do once the weights are loaded."""
    with vllms_dtype():
        for layer in model.experts().values():
            layer.quant_method.process_weights_after_loading(layer)


def dense_model(config: K26Config) -> Model:
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_the_right_ones_serve(config: K26Config, log: pytest.LogCaptureFixture) -> None:
    """vLLM's CPU kernels pass the check with bfloat16 weights. The check is taken off then, so that an update of the
    weights is not checked again."""
    model = dense_model(config)
    watch_engine_experts(model, None)
    finish(model)
    (line,) = log.messages
    assert re.search(rf"vLLM's own experts \({KERNEL}\) passed the test on cpu: relative error 0\.00", line)
    assert f", {min(3, len(model.experts()))} layers, " in line
    assert all("process_weights_after_loading" not in vars(layer.quant_method) for layer in model.experts().values())


def test_the_test_takes_the_memory_of_a_few_experts(
    config: K26Config, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Although the layers have many experts, the check of a layer holds only a few of them, and gives them back before
    the next layer's check."""
    text = replace(config.text, n_routed_experts=96, num_experts_per_tok=4, hidden_size=512, moe_intermediate_size=256)
    vision = replace(config.vision, text_hidden_size=text.hidden_size)
    model = dense_model(replace(config, text=text, vision=vision))
    counted, original = LiveBytes(), EngineTest._attempt

    def attempt(*arguments: Any) -> Any:
        with counted:
            return original(*arguments)

    monkeypatch.setattr(EngineTest, "_attempt", attempt)
    watch_engine_experts(model, None)
    finish(model)
    assert "passed the test on cpu" in log.text
    expert_bytes = 4 * 3 * text.hidden_size * text.moe_intermediate_size
    # The sizes are those in float32. The copies of a token's experts take half of that, one expert at a time is made
    # dense, and the rows of the tokens are those of the largest batch.
    batch_bytes = 4 * max(BATCHES) * text.num_experts_per_tok * (text.hidden_size + 2 * text.moe_intermediate_size)
    assert text.num_experts_per_tok / 2 * expert_bytes < counted.peak
    assert counted.peak < text.num_experts_per_tok * expert_bytes + 2 * batch_bytes
    assert counted.live == 0


def repeat_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break vLLM's kernel in a way that issues report of some GPUs: each token gets the first token's result."""
    original = cpu_moe.CPUUnquantizedExperts.apply

    def apply(self: Any, output: torch.Tensor, *arguments: Any, **options: Any) -> None:
        original(self, output, *arguments, **options)
        output.copy_(output[:1].expand(output.shape).clone())

    monkeypatch.setattr(cpu_moe.CPUUnquantizedExperts, "apply", apply)


def test_wrong_ones_stop_the_start(config: K26Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong experts stop the start if the core's cannot take their place, as for weights in bfloat16."""
    repeat_one_token(monkeypatch)
    model = dense_model(config)
    watch_engine_experts(model, None)
    said = rf"vLLM's own experts \({KERNEL}\) are wrong on cpu: relative error .* \(limit 0.05\), and the core's"
    with pytest.raises(ExpertsError, match=said + " cannot take their place: they are for the published INT4 weights"):
        finish(model)


def test_what_cannot_be_tested_serves(
    config: K26Config, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """Experts whose method the check cannot call, such as that of another release, serve untested, and one line of the
    log says so for all layers."""

    def apply(self: Any, layer: Any, x: Any, topk_weights: Any, topk_ids: Any) -> None:
        raise TypeError("a buffer is missing")

    monkeypatch.setattr(fused_moe.UnquantizedFusedMoEMethod, "apply", apply)
    model = dense_model(config)
    watch_engine_experts(model, None)
    finish(model)
    (line,) = log.messages
    said = rf"k26-plugins: vLLM's own experts \({KERNEL}\) serve untested: TypeError: a buffer is missing\."
    assert re.fullmatch(said, line)


class Plain:
    """A stand-in for vLLM's INT4 kernels, none of which runs on every CPU.

    It puts vLLM's own parameters and loader around a product in plain PyTorch, which in the layer `wrong` takes the
    gate projection for the up projection.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: int | None) -> None:
        self.wrong, self.dense = wrong, dict[int, tuple[torch.Tensor, torch.Tensor]]()
        kernel = wna16.CompressedTensorsWNA16MoEMethod

        def make(method: Any, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None) -> None:
            base: Any = super(kernel, method)
            base.__init__(moe)
            method.strategy, method.group_size, method.symmetric = "group", weight_quant.group_size, True
            method.num_bits, method.packed_factor = 4, 8

        def apply(method: Any, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, *shared: Any) -> torch.Tensor:
            w13, w2 = self.dense[id(layer)]
            gate, up = torch.einsum("th,tkih->tki", x.float(), w13[topk_ids.long()]).chunk(2, dim=-1)
            y = torch.einsum("tki,tkhi->tkh", torch.nn.functional.silu(gate) * up, w2[topk_ids.long()])
            return (y * topk_weights[..., None]).sum(1).to(x.dtype)

        monkeypatch.setattr(kernel, "__init__", make)
        monkeypatch.setattr(kernel, "process_weights_after_loading", lambda method, layer: self.process(layer))
        monkeypatch.setattr(kernel, "apply", apply)

    def process(self, layer: Any) -> None:
        """Put the weights into another layout, as kernels do, so that the loaded weights are gone."""
        w13 = torch.stack([dense(*one) for one in zip(layer.w13_weight_packed, layer.w13_weight_scale, strict=True)])
        w2 = torch.stack([dense(*one) for one in zip(layer.w2_weight_packed, layer.w2_weight_scale, strict=True)])
        if f".layers.{self.wrong}." in layer.layer_name:
            w13 = torch.cat(w13.chunk(2, dim=1)[::-1], dim=1)
        self.dense[id(layer)] = w13.float(), w2.float()
        for name in ("w13_weight_packed", "w2_weight_packed"):
            layer._parameters[name].data.zero_()


def int4_model(config: K26Config, checkpoint: Checkpoint) -> Model:
    """Return a model whose parameters vLLM's own weight loaders have loaded, and whose experts are watched."""
    settings = json.loads((checkpoint.folder / "config.json").read_text())["text_config"]["quantization_config"]
    model = Model(config, compat.compressed_tensors_config().from_config(settings))
    watch_engine_experts(model, config)
    files = sorted(checkpoint.folder.glob("*.safetensors"))
    files_read.extend(map(str, files))
    unused: Any = None
    layers = {
        # vLLM's own experts are neither opened nor closed, and there are no experts of the core to repack.
        number: ExpertsOfLayer(
            module, unused, lambda: False, lambda: None, compat.physical_ids(module), lambda expert: True
        )
        for number, module in model.experts().items()
    }
    for _ in load_experts(mapped_tensors(files), config, layers):
        pass
    return model


@pytest.fixture
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return Checkpoint(tiny_folder)


def worst(model: Model, checkpoint: Checkpoint) -> float:
    """Return the largest error of the layers as they serve now, against float64 on the checkpoint's weights."""
    text, errors = checkpoint.config.text, []
    for number, layer in model.experts().items():
        moe = MoE(text, checkpoint.tensor, number)
        experts = [moe.expert(index) for index in range(text.n_routed_experts)]
        weights = ExpertWeights(*(torch.stack(parts) for parts in zip(*experts, strict=True)))
        ids, topk_weights = route(20, text.num_experts_per_tok, text.n_routed_experts)
        x = inputs(20, text.hidden_size)
        result = layer.quant_method.apply(layer, x, topk_weights, ids, None, None)
        errors.append(error(result, judge(weights, x, ids, topk_weights)))
    return max(errors)


def test_right_int4_ones_are_kept(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    Plain(monkeypatch, None)
    model = int4_model(checkpoint.config, checkpoint)
    finish(model)
    assert "vLLM's own experts (CompressedTensorsWNA16MoEMethod) passed the test on cpu" in log.messages[-1]
    assert not any(isinstance(layer.quant_method, K26ExpertsMethod) for layer in model.experts().values())
    assert worst(model, checkpoint) < 1e-2


@pytest.mark.parametrize("which", ["first", "last"])
def test_the_core_takes_the_place_of_wrong_ones(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, which: str
) -> None:
    """The core serves all layers, including those that vLLM has repacked by then."""
    text = checkpoint.config.text
    Plain(monkeypatch, text.first_k_dense_replace if which == "first" else text.num_hidden_layers - 1)
    model = int4_model(checkpoint.config, checkpoint)
    finish(model)
    (line,) = [message for message in log.messages if "take their place" in message]
    assert "vLLM's own experts (CompressedTensorsWNA16MoEMethod) are wrong on cpu: relative error " in line
    assert all(isinstance(layer.quant_method, K26ExpertsMethod) for layer in model.experts().values())
    assert worst(model, checkpoint) < 1e-2


def test_the_core_s_are_ready_for_every_batch(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core's experts are made ready for the batches of each of vLLM's layers, before it serves."""
    text = checkpoint.config.text
    seen = record(monkeypatch, *BACKENDS.values())
    Plain(monkeypatch, text.first_k_dense_replace)
    model = int4_model(checkpoint.config, checkpoint)
    finish(model)
    assert [number for number, _ in seen] == [text.n_routed_experts] * len(model.experts())
    assert {batches[:3] for _, batches in seen} == {(text.num_experts_per_tok, None, torch.bfloat16)}


REFUSED = {
    "vLLM's by name": ("engine", True, "K26_EXPERTS=engine asks for vLLM's. Unset it"),
    "weights that come once": ("auto", False, "Set K26_EXPERTS=triton"),
}
"""(K26_EXPERTS, whether the checkpoint's files are known, the error) of each case."""


@pytest.mark.parametrize("name", REFUSED)
def test_the_core_cannot_take_their_place(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    setting, has_files, said = REFUSED[name]
    monkeypatch.setenv("K26_EXPERTS", setting)
    Plain(monkeypatch, checkpoint.config.text.first_k_dense_replace)
    model = int4_model(checkpoint.config, checkpoint)
    if not has_files:
        files_read.clear()
    with pytest.raises(ExpertsError, match=said):
        finish(model)
