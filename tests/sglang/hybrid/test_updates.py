"""Tests of weights that are updated while a hybrid run serves, against float64."""

from __future__ import annotations

import logging
from typing import Any

import torch
from support.experts import error, inputs, judge, make_weights, route
from support.sglang_server import runs_hybrid

from k26_plugins.common.experts.moving import Uses

pytestmark = runs_hybrid


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
