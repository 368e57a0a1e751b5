"""List where a configuration of this architecture departs from what the core's arithmetic relies on.

A departure is no error, because an engine may serve such a model by its own code. Sizes are never departures: the core
serves all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

# The values that the arithmetic of this package relies on. A missing field counts as having the published value.
_TEXT_FIXED: dict[str, tuple[object, ...]] = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "n_group": (1, None),
    "topk_group": (1, None),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "num_nextn_predict_layers": (0, None),
}
_VISION_FIXED: dict[str, tuple[object, ...]] = {
    "merge_type": ("sd2_tpool",),
    "pos_emb_type": ("divided_fixed",),
    "video_attn_type": ("spatial_temporal",),
    "mm_projector_type": ("patchmerger",),
    "projector_hidden_act": ("gelu",),
    "hidden_act": ("gelu_pytorch_tanh",),
}
_WEIGHTS_FIXED: dict[str, object] = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "actorder": None,
}
# The parts that the published configuration keeps in bfloat16, with the name of one linear layer of each.
_NOT_QUANTIZED = {
    "lm_head": "lm_head",
    "the attention": "model.layers.{moe}.self_attn.o_proj",
    "the shared experts": "model.layers.{moe}.mlp.shared_experts.down_proj",
}


def departures(config: Mapping[str, Any]) -> list[str]:
    """Return a message for each departure, such as "config field 'FIELD' is VALUE, expected EXPECTED".

    The list is empty for a configuration as published. `config` is a mapping that `K26Config.read` accepts.
    """
    text, vision = config["text_config"], config["vision_config"]
    found = [
        _differs(f"{prefix}.{name}", part[name], *allowed)
        for prefix, part, fixed in (("text_config", text, _TEXT_FIXED), ("vision_config", vision, _VISION_FIXED))
        for name, allowed in fixed.items()
        if name in part and part[name] not in allowed
    ]
    if config.get("tie_word_embeddings") and text.get("tie_word_embeddings", True):
        found.append(_differs("tie_word_embeddings", True, False))
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    if not is_yarn(scaling):
        kind = _rope_type(scaling) if isinstance(scaling, Mapping) else scaling
        found.append(_differs("text_config.rope_scaling.type", kind, "yarn"))
    return found + _quantization(quantization_config(config), text)


def quantization_config(config: Mapping[str, Any]) -> Any:
    """Return the description of the quantization, or None if there is none.

    Some files have it at the top level, others inside `text_config`.
    """
    return config.get("quantization_config") or config["text_config"].get("quantization_config")


def is_yarn(scaling: object) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a configuration's `rope_scaling` is YaRN, by the published type or by an engine's name for it."""
    # SGLang and vLLM rename the type for their DeepSeek rotary class.
    return isinstance(scaling, Mapping) and _rope_type(scaling) in ("yarn", "deepseek_yarn")


def is_quantized(module: str, group: Mapping[str, Any], ignore: Iterable[str]) -> bool:
    """Return whether a quantization group of compressed-tensors covers a linear layer.

    module: the layer's name without `language_model.`. ignore: the description's list of layers that are left out.
    """
    targets = group.get("targets") or ()
    chosen = any(target == "Linear" or _matches(target, module) for target in targets)
    return chosen and not any(_matches(entry, module) for entry in ignore)


def _matches(entry: str, module: str) -> bool:
    names = (module, f"language_model.{module}")
    if entry.startswith("re:"):
        return any(re.match(entry[3:], name) for name in names)
    return entry in names


def _rope_type(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("rope_type") or scaling.get("type")


def _differs(name: str, value: object, *expected: object) -> str:
    return f"config field {name!r} is {value!r}, expected {' or '.join(map(repr, expected))}"


def _quantization(quantization: Any, text: Mapping[str, Any]) -> list[str]:
    prefix = "quantization_config"
    if not isinstance(quantization, Mapping):
        return [_differs(prefix, quantization, "the INT4 description")]
    for name, required in (("quant_method", "compressed-tensors"), ("format", "pack-quantized")):
        if quantization.get(name) != required:
            return [_differs(f"{prefix}.{name}", quantization.get(name), required)]
    groups = quantization.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, Mapping) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if group is None or not isinstance(weights, Mapping):
        return [_differs(f"{prefix}.config_groups", groups, "one group with weights")]
    found = [
        _differs(f"{prefix}.config_groups.{name}", group[name], None)
        for name in ("input_activations", "output_activations")
        if group.get(name) is not None
    ]
    for name, expected in _WEIGHTS_FIXED.items():
        if (weights.get(name) or None) != (expected or None):
            found.append(_differs(f"{prefix}.config_groups.weights.{name}", weights.get(name), expected))
    if quantization.get("kv_cache_scheme") is not None:
        found.append(_differs(f"{prefix}.kv_cache_scheme", quantization["kv_cache_scheme"], None))
    return found + _quantized_parts(group, quantization.get("ignore") or (), text)


def _quantized_parts(group: Mapping[str, Any], ignore: Iterable[str], text: Mapping[str, Any]) -> list[str]:
    dense = text.get("first_k_dense_replace") or 0
    parts = {what: name.format(moe=dense) for what, name in _NOT_QUANTIZED.items()}
    if dense:
        parts["the dense layers"] = f"model.layers.{dense - 1}.mlp.down_proj"
    found = [
        f"config field 'quantization_config.ignore' leaves out {what}, which is then quantized too"
        for what, name in parts.items()
        if is_quantized(name, group, ignore)
    ]
    if not is_quantized(f"model.layers.{dense}.mlp.experts.0.down_proj", group, ignore):
        found.append("config field 'quantization_config' does not cover the routed experts, expected INT4")
    return found
