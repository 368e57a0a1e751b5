"""Looks up what the adapter needs of SGLang's loading of a checkpoint. `compat` looks up the rest."""

from __future__ import annotations

from typing import Any

from k26_plugins.sglang import compat, names


def object_store_folder(name: str, *, fetch: bool = False) -> str:
    """Return the folder in which SGLang keeps the small files of a model in an object store.

    Any other name is returned as it is. fetch: whether to download the files first.
    """
    # KTransformers' fork cannot read from object stores.
    if not compat.ENGINE.has_module(names.OBJECT_STORE) or not compat.private(names.IN_OBJECT_STORE)(name):
        return name
    store = compat.private(names.OBJECT_STORE)
    return str((store.download_and_get_path if fetch else store.get_path)(name))


def keeps_its_experts() -> bool:
    """Return whether fused-MoE layers keep on this rank the experts of `local_experts`, in that order and for ever.

    They do not if SGLang places, moves or copies experts.
    """
    arguments = compat.server_args()
    moved = arguments.init_expert_location != "trivial" or arguments.enable_eplb
    return not moved and not arguments.ep_num_redundant_experts


def load_format() -> str:
    """Return the value of --load-format."""
    chosen = compat.server_args().load_format
    return str(getattr(chosen, "value", chosen))


def loads_saved_state() -> bool:
    """Return whether SGLang is to load a state that was saved from a running model."""
    return load_format() == "sharded_state"


def local_experts(layer: Any) -> range:
    """Return the checkpoint's experts that a fused-MoE layer may keep on this rank, whole or in part."""
    total: int = layer.num_experts
    if layer.moe_ep_size == 1 or not keeps_its_experts():
        return range(total)
    number = total // layer.moe_ep_size
    return range(layer.moe_ep_rank * number, (layer.moe_ep_rank + 1) * number)


def serves_adapters() -> bool:
    """Return whether LoRA is on. SGLang turns it on by itself if the user's flags name adapters."""
    return bool(compat.server_args().enable_lora)
