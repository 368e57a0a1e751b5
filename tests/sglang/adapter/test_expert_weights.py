"""Tests that a layer's experts are loaded, and updated while they serve, against float64."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.experts import error, inputs, judge, route
from support.made_ready import record
from support.sglang_parts import FusedMoE

from k26_plugins.common.checkpoint import Checkpoint, expert_name
from k26_plugins.common.experts import ExpertWeights
from k26_plugins.common.experts.cpu import CpuExperts
from k26_plugins.common.experts.loading import load_experts
from k26_plugins.common.tiny.checkpoint import make_tiny
from k26_plugins.sglang import compat


@pytest.mark.parametrize("on_device", [None, 0, 3])
def test_a_layer_s_experts_are_loaded_and_updated(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_device: int | None
) -> None:
    """A layer's tensors are loaded by their names in the checkpoint, without a hybrid run (None), or with none or three
    of its experts on the device; the first update comes in two halves."""
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
    layer: Any = FusedMoE()
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
    scheme.process_weights_after_loading(layer)  # SGLang 0.5.10 ends each update with this call
    assert_computed(new)
    scheme.restore_weights_before_loading(layer)  # later releases begin an update with this call
    load(old, names)
    scheme.process_weights_after_loading(layer)
    assert_computed(old)


def load_whole(param: Any, weight: torch.Tensor, name: str, shard_id: str, expert_id: int) -> None:
    """Copy one expert's matrix into a parameter, as SGLang's weight loader does on a single rank."""
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
