"""Holds SGLang's logit processors for tests: one writes scripted answers, the other inspects or changes the model.

They run inside SGLang's scheduler; a test sends them with a request to a server that has
`--enable-custom-logit-processor`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from support.contract import differing
from support.faults import FAULTY_EXPERT, FAULTY_LAYER
from support.server import Server


class Scripted(CustomLogitProcessor):
    """SGLang's part of `support.scripted`: writes the answer whose token ids a request's `custom_params` give, as in
    `{"script": [1, 2, 3]}`."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        for row, params in enumerate(custom_param_list or []):
            request = params["__req__"]
            # SGLang schedules ahead, so the request's own list of tokens may be one token behind.
            position = getattr(request, "scripted_position", 0)
            request.scripted_position = position + 1
            logits[row] = -torch.inf
            logits[row, params["script"][min(position, len(params["script"]) - 1)]] = 0
        return logits


class Inside(CustomLogitProcessor):
    """Does to the serving model what a request's `custom_params` name, as in `{"do": "weigh"}`.

    The name is one of LOOKS or of FAULTS, or "undo", which takes the last fault out.
    """

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        for params in custom_param_list or []:
            if params["do"] in LOOKS:
                LOOKS[params["do"]]()
            else:
                _undo()
                FAULTS.get(params["do"], list)()
        return logits


def _runner() -> Any:
    """Return SGLang's ModelRunner, which is calling this code to sample, from the stack, since no name leads to it."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if type(owner).__name__ == "ModelRunner":
            return owner
        frame = frame.f_back
    raise LookupError("not called by a ModelRunner")


def _weigh() -> None:
    """Write into the server's log how many bytes weights and KV cache take, because SGLang's own log rounds to
    hundredths of a GB."""
    model, pool = _runner().model, _runner().token_to_kv_pool
    held = list(model.parameters())
    for module in model.modules():
        held += [tensor for name in ("w_kc", "w_vc") if (tensor := getattr(module, name, None)) is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    tokens, cache = pool.size, sum(buffer[: pool.size].nbytes for buffer in pool.kv_buffer)
    print(f"weights: {sum(storages.values())} bytes, {tokens} tokens of KV cache: {cache} bytes", flush=True)


def _compare_with_language_model() -> None:
    from k26_plugins.sglang.model import OF_LANGUAGE_MODEL

    model = _runner().model
    print(f"contract: {differing(model, model.language_model, OF_LANGUAGE_MODEL)}", flush=True)


def _read_expert_again() -> None:
    """Read an expert from the disk again, as SGLang does when the rank that had it is lost."""
    runner = _runner()
    args = runner.server_args
    wanted = runner.model.generate_weight_name_filter({FAULTY_LAYER: [FAULTY_EXPERT]})
    updater = getattr(runner, "weight_updater", runner)
    found = updater.update_weights_from_disk(args.model_path, args.load_format, weight_name_filter=wanted)
    print(f"read again: {found}, {len(runner.model.left_out)} left out", flush=True)


LOOKS = {
    "weigh": _weigh,
    "compare with the language model": _compare_with_language_model,
    "read an expert again": _read_expert_again,
}
_saved: list[tuple[torch.Tensor, torch.Tensor]] = []


def _write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    _saved.append((tensor.data, tensor.detach().clone()))
    tensor.data.copy_(value)


def _undo() -> None:
    while _saved:
        tensor, before = _saved.pop()
        tensor.copy_(before)


def _double_scale() -> None:
    layer = _runner().model.language_model.model.layers[FAULTY_LAYER]
    scale = next(module.k26_w2_scale for module in layer.modules() if hasattr(module, "k26_w2_scale"))
    _write(scale[FAULTY_EXPERT], scale[FAULTY_EXPERT] * 2)


def _drop_bias() -> None:
    for name, tensor in _runner().model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            _write(tensor, torch.zeros_like(tensor))


FAULTS = {"one expert's scale doubled": _double_scale, "router bias dropped": _drop_bias}


def order(server: Server, what: str) -> None:
    """Have `Inside` do `what` in the server, and empty the prefix cache, whose entries were computed before."""
    server.chat("Hello", max_tokens=1, custom_logit_processor=Inside.to_str(), custom_params={"do": what})
    server.post("/flush_cache").raise_for_status()
