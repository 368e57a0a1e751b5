"""Tests the routed experts that SGLang's own code computes before they serve, and has the core's take their place if
they are wrong. The test calls the layer's own quantization method."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from k26_plugins.common.experts import ExpertsError
from k26_plugins.common.experts.engine_test import (
    EngineLayer,
    UntestableError,
    require_replaceable,
    stop,
    watch_layers,
)
from k26_plugins.common.experts.triton import TritonExperts
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.settings import EXPERTS
from k26_plugins.sglang import compat, logger
from k26_plugins.sglang.experts import K26MoEScheme


class WrongExpertsError(ExpertsError):
    """SGLang's own experts are wrong, and the core's can take their place."""


def watch_engine_experts(model: torch.nn.Module, config: K26Config | None) -> None:
    """Have the experts that SGLang's own methods compute tested as soon as their weights are loaded and repacked.

    If their results are wrong, the loading ends with an ExpertsError. It is a WrongExpertsError if the model can be
    built again with the core's experts; it has to be built again because SGLang's layers are built around their kernel.
    config: the model's configuration if the checkpoint is in the published layout, the only one that the core's experts
    can serve; None for another layout.
    """

    def on_wrong(wrong: str) -> None:
        require_replaceable(wrong, "SGLang", published_layout=config is not None)
        if not compat.moe_runner_backend().is_auto():
            # It does not matter who chose the runner: other parts of SGLang have gone by that choice too.
            remedy = f"Set {EXPERTS.variable}={TritonExperts.name}, or another --moe-runner-backend"
            stop(wrong, f"--moe-runner-backend names theirs. {remedy}")
        raise WrongExpertsError(wrong)

    layers = {
        module.layer_id: partial(_layer, module, getattr(model.get_submodule(name.rpartition(".")[0]), "topk", None))
        for name, module in model.named_modules()
        if is_sglangs(module)
    }
    watch_layers("SGLang", logger, layers, on_wrong)


def is_sglangs(module: Any) -> bool:
    """Return whether a module holds routed experts that SGLang's own method computes."""
    names = ("quant_method", "moe_runner_config", "layer_id", "num_local_experts")
    return all(hasattr(module, name) for name in names) and not isinstance(
        getattr(module, "scheme", None), K26MoEScheme
    )


def _layer(module: Any, topk: Any) -> EngineLayer:
    """Describe a layer for the test. topk: SGLang's module that chooses the experts for this layer's tokens."""
    choice: list[Any] = []

    def global_ids(local: list[int]) -> list[int]:
        first = module.moe_ep_rank * module.num_local_experts
        return [first + place for place in local]

    def computed(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if not compat.moe_all_to_all().is_none():
            raise UntestableError("their tokens come from other ranks")
        if topk is None:
            raise UntestableError("nothing chooses experts in front of them")
        # SGLang's kernel takes a routing of a certain class. So SGLang's own module makes one, and its contents are
        # replaced. It is made only once, because SGLang compiles that module on a CPU.
        if not choice:
            choice.append(topk(x[:1], torch.zeros(1, module.num_experts, dtype=torch.float32, device=x.device)))
        if not hasattr(choice[0], "topk_ids"):
            raise UntestableError("their kernel routes the tokens by itself")
        ids = topk_ids.to(choice[0].topk_ids.dtype)
        logits = torch.zeros(len(x), module.num_experts, dtype=torch.float32, device=x.device)
        chosen = choice[0]._replace(topk_weights=topk_weights, topk_ids=ids, router_logits=logits)
        dispatched = module.dispatcher.dispatch(x, chosen)
        result: torch.Tensor = module.quant_method.apply(module, dispatched).hidden_states
        return result

    config = module.moe_runner_config
    # Some kernels multiply the sum by the model's routed scaling factor; for others the layer does.
    scales = (1.0, getattr(config, "routed_scaling_factor", None) or 1.0)
    return EngineLayer(
        module, module.quant_method, lambda: kernel_name(module), module.top_k or 1, global_ids, computed, scales
    )


def kernel_name(module: Any) -> str:
    """Return the name of a layer's scheme, or of its method if there is none, followed by the name of its runner."""
    runner = getattr(getattr(module, "runner_backend", None), "value", None)
    name = type(getattr(module, "scheme", None) or module.quant_method).__name__
    return name if runner is None else f"{name}, {runner}"
