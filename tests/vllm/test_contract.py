"""Tests that our model class has what vLLM looks up on the model that it serves.

vLLM's in-tree class for this model lacks some of these attributes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from support.contract import looked_up, members

NOT_GIVEN = {
    **dict.fromkeys(
        (
            "expert_weights", "moe_layers", "num_expert_groups", "num_local_physical_experts", "num_logical_experts",
            "num_moe_layers", "num_physical_experts", "num_redundant_experts", "num_routed_experts", "set_eplb_state",
            "update_physical_experts_metadata",
        ),
        "taken from the language model, which `get_mixture_of_experts_model` finds in a multimodal model",
    ),
    "get_expert_mapping": "for the reloading of weights by layers, which takes it from whichever module has it",
    "lm_head": "taken from the language model, by `get_language_model`",
    "model": "as above, and from draft models",
}  # fmt: skip


def test_the_model_has_what_vllm_looks_up() -> None:
    import vllm
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM

    from k26_plugins.vllm.model import KimiK25ForConditionalGeneration

    found = looked_up(Path(next(iter(vllm.__path__))), without=("model_executor/models",))
    of_language_model = members(DeepseekV2ForCausalLM)
    assert {"lm_head", "packed_modules_mapping", "set_aux_hidden_state_layers"} <= found.keys() & of_language_model
    ours = members(KimiK25ForConditionalGeneration)
    assert {name: found[name] for name in (found.keys() & of_language_model) - ours - NOT_GIVEN.keys()} == {}


def test_the_model_passes_every_check_that_a_part_of_it_passes() -> None:
    """Our class passes every check that the language model's class or the in-tree class passes. vLLM makes these checks
    (`supports_…`, `is_…` and the like) on a model's class before it starts a feature."""
    from vllm.model_executor.models import interfaces, interfaces_base
    from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM

    from k26_plugins.vllm import compat
    from k26_plugins.vllm.model import KimiK25ForConditionalGeneration

    checks = {
        name: check
        for module in (interfaces, interfaces_base)
        for name, check in inspect.getmembers(module, inspect.isfunction)
        if check.__module__ == module.__name__ and re.match(r"(supports|is|has|requires)_", name)
    }
    in_tree = compat.in_tree_model().KimiK25ForConditionalGeneration
    passed = {
        model: {name for name, check in checks.items() if check(model)}
        for model in (DeepseekV3ForCausalLM, in_tree, KimiK25ForConditionalGeneration)
    }
    parts = passed[DeepseekV3ForCausalLM] | passed[in_tree]
    assert {"supports_lora", "supports_pp", "supports_multimodal", "supports_eagle3"} <= parts
    assert parts - passed[KimiK25ForConditionalGeneration] == set()
