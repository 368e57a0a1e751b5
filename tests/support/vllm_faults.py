"""Seeds faults into a running vLLM and takes them out again, and reports how many bytes of weights its workers hold.

    vllm serve … --worker-extension-cls support.vllm_faults.Workers --middleware support.vllm_faults.Frontend

A fault of the weights or of the model's code is put into the workers. A fault of the prompt's path is put into the API
server's process, which renders, tokenizes and preprocesses.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import torch
from support.faults import FAULTY_EXPERT, FAULTY_LAYER, shift_by_three

FAULT_PATH = "/test/fault"
WEIGHTS_PATH = "/test/weights"
STOPS_FOR_STOP = "stops for stop"


class Workers:
    """Methods that vLLM mixes into its worker class, of which each rank's process has an object.

    `self.model_runner` is the worker's.
    """

    model_runner: Any

    def k26_seed(self, name: str) -> None:
        """Put the fault `name` into this rank's model, remembering what it replaces."""
        self._k26_saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._k26_attributes: list[tuple[Any, str, Any]] = []
        text = self.model_runner.get_model().language_model.model
        _WORKER_FAULTS[name](self, text)

    def k26_undo(self) -> None:
        """Take the last fault out again."""
        for tensor, before in reversed(self._k26_saved):
            tensor.copy_(before)
        for owner, attribute, before in self._k26_attributes:
            setattr(owner, attribute, before)

    def k26_weights(self) -> int:
        """Return the bytes of the model's parameters on this rank.

        vLLM's log rounds them to 0.01 GiB, which is more than the tiny model has.
        """
        model = self.model_runner.get_model()
        storages = {tensor.untyped_storage() for tensor in model.parameters()}
        held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        for layer in model.modules():
            # On CPUs oneDNN packs a linear layer's weight and vLLM empties the parameter; the packed weight has as many
            # bytes, but PyTorch does not see them.
            if getattr(layer, "weight", None) is not None and layer.weight.numel() == 0:
                rows = getattr(layer, "output_size_per_partition", None) or layer.output_size
                inputs = getattr(layer, "input_size_per_partition", None) or layer.input_size
                held += rows * inputs * layer.weight.element_size()
        return held

    def _k26_write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        self._k26_saved.append((tensor.data, tensor.detach().clone()))
        tensor.data.copy_(value)


def _experts(text: Any) -> list[Any]:
    return [module for module in text.modules() if hasattr(module, "k26_w2_packed")]


def _double_scale(worker: Workers, text: Any) -> None:
    scale = next(m for m in text.layers[FAULTY_LAYER].modules() if hasattr(m, "k26_w2_scale")).k26_w2_scale
    worker._k26_write(scale[FAULTY_EXPERT], scale[FAULTY_EXPERT] * 2)


def _swap_gate_and_up(worker: Workers, text: Any) -> None:
    for layer in _experts(text):
        for tensor in (layer.k26_w13_packed, layer.k26_w13_scale):
            halves = tensor.chunk(2, dim=1)
            worker._k26_write(tensor, torch.cat(halves[::-1], dim=1))


def _drop_bias(worker: Workers, text: Any) -> None:
    for module in text.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            worker._k26_write(bias, torch.zeros_like(bias))


def _halve_yarn(worker: Workers, text: Any) -> None:
    """Change the rotation and the factor on the softmax as if config.json said half of YaRN's factor."""
    from vllm.model_executor.layers.rotary_embedding.common import yarn_get_mscale

    rotary = next(module for module in text.modules() if hasattr(module, "cos_sin_cache"))
    factor = rotary.scaling_factor
    rotary.scaling_factor = factor / 2
    cache = rotary._compute_cos_sin_cache()
    rotary.scaling_factor = factor
    worker._k26_write(rotary.cos_sin_cache[: len(cache)], cache)
    ratio = (yarn_get_mscale(factor / 2, 1.0) / yarn_get_mscale(factor, 1.0)) ** 2
    answers = [module.impl for module in text.modules() if hasattr(module, "impl")]
    groups = [group for groups in worker.model_runner.attn_groups for group in groups]
    prompts = [builder._prefill_backend for group in groups for builder in group.metadata_builders]
    for owner in (*answers, *prompts):
        worker._k26_attributes.append((owner, "scale", owner.scale))
        owner.scale *= ratio


def _swap_shards(worker: Workers, text: Any) -> None:
    """Have each of two ranks compute with the other's columns of every down projection."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    assert group.world_size == 2
    for layer in _experts(text):
        for tensor in (layer.k26_w2_packed, layer.k26_w2_scale):
            both = [torch.empty_like(tensor) for _ in range(2)]
            torch.distributed.all_gather(both, tensor.data, group=group.cpu_group)
            worker._k26_write(tensor, both[1 - group.rank_in_group])


_WORKER_FAULTS: dict[str, Callable[[Workers, Any], None]] = {
    "one expert's scale doubled": _double_scale,
    "gate and up swapped": _swap_gate_and_up,
    "router bias dropped": _drop_bias,
    "YaRN's factor halved": _halve_yarn,
    "tensor-parallel shards swapped": _swap_shards,
}


def _shifted(encode: Callable[..., Any]) -> Callable[..., Any]:
    def encode_shifted(*args: Any, **kwargs: Any) -> Any:
        encoded = encode(*args, **kwargs)
        encoded["input_ids"] = shift_by_three(encoded["input_ids"])
        return encoded

    return encode_shifted


def _without_think(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: apply(*args, **kwargs).removesuffix("<think>")


def _padded_late(patchify: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `patchify` so that padded pixels are about 0 after normalizing, as if images were padded after that step.

    vLLM normalizes in the worker, from bytes; the byte 128 comes nearest to 0, with 0.004.
    """

    def patchify_grey(frames: Any, resize: Any, config: Any) -> Any:
        patches = patchify(frames, resize, config)
        size = config.patch_size
        picture = patches.reshape(-1, resize.grid_h, resize.grid_w, 3, size, size).transpose(0, 1, 4, 2, 5, 3)
        picture = picture.reshape(len(frames), resize.grid_h * size, resize.grid_w * size, 3).copy()
        picture[:, resize.height :] = 128
        picture[:, :, resize.width :] = 128
        cut = picture.reshape(len(frames), resize.grid_h, size, resize.grid_w, size, 3).transpose(0, 1, 3, 5, 2, 4)
        return cut.reshape(patches.shape)

    return patchify_grey


def _for_stop(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the constructor of a choice so that an answer with tool calls has the finish reason `stop`."""

    def make_for_stop(choice: Any, **fields: Any) -> None:
        make(choice, **{**fields, "finish_reason": fields["finish_reason"].replace("tool_calls", "stop")})

    return make_for_stop


_FRONTEND_FAULTS: dict[str, tuple[str, str, Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    "token ids shifted by 3": ("k26_plugins.common.prompt.hf_tokenizer:KimiTokenizerFast", "_encode_plus", _shifted),
    "think block missing": (
        "k26_plugins.common.prompt.hf_tokenizer:KimiTokenizerFast", "apply_chat_template", _without_think,
    ),
    "padding after normalizing": ("k26_plugins.common.multimodal.image", "patchify", _padded_late),
    STOPS_FOR_STOP: (
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionResponseChoice", "__init__", _for_stop,
    ),
}  # fmt: skip
FAULTS = (*_WORKER_FAULTS, *(name for name in _FRONTEND_FAULTS if name != STOPS_FOR_STOP))
"""The names of the faults that change what the model answers."""


class Frontend:
    """ASGI middleware of vLLM's API server that answers the requests of `order` and `weights_of` and passes on
    others."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.undo: list[Callable[[], None]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in (FAULT_PATH, WEIGHTS_PATH):
            await self.app(scope, receive, send)
            return
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        engine = scope["app"].state.engine_client
        answer: Any = None
        if scope["path"] == WEIGHTS_PATH:
            answer = await engine.collective_rpc("k26_weights")
        else:
            await self._fault(engine, json.loads(await Request(scope, receive).body())["name"])
        await JSONResponse(answer)(scope, receive, send)

    async def _fault(self, engine: Any, name: str | None) -> None:
        if name in _WORKER_FAULTS:
            await engine.collective_rpc("k26_seed", args=(name,))
        elif name is not None:
            self._patch(*_FRONTEND_FAULTS[name])
        elif self.undo:
            self.undo.pop()()
        else:
            await engine.collective_rpc("k26_undo")
        # Otherwise images that were seen before would not be preprocessed and encoded again.
        await engine.reset_mm_cache()
        await engine.reset_encoder_cache()

    def _patch(self, where: str, attribute: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        from pkgutil import resolve_name

        owner = resolve_name(where)
        before = getattr(owner, attribute)
        self.undo.append(lambda: setattr(owner, attribute, before))
        setattr(owner, attribute, change(before))


def order(url: str, name: str | None) -> None:
    """Put the fault `name` into the server at `url`; None takes the last one out again."""
    httpx.post(f"{url}{FAULT_PATH}", json={"name": name}, timeout=60).raise_for_status()


def weights_of(url: str) -> list[int]:
    """Return the bytes of each rank's weights in the server at `url`."""
    found: list[int] = httpx.get(f"{url}{WEIGHTS_PATH}", timeout=60).raise_for_status().json()
    return found
