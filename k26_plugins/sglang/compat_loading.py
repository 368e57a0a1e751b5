"""What the adapter touches of SGLang's ways to a checkpoint's files, beside `compat`."""

from __future__ import annotations

from typing import Any

from k26_plugins.sglang import compat, names


def object_store_folder(name: str, *, fetch: bool = False) -> str:
    """Where SGLang keeps the small files of an object store's model, fetched if need be; any other name as it is."""
    # KTransformers' fork reads no object stores.
    if not compat.ENGINE.has_module(names.OBJECT_STORE) or not compat.private(names.IN_OBJECT_STORE)(name):
        return name
    store = compat.private(names.OBJECT_STORE)
    return str((store.download_and_get_path if fetch else store.get_path)(name))


def keeps_its_experts() -> bool:
    """Whether fused-MoE layers have on this rank the experts of `local_experts`, in their order, once and for all."""
    arguments = compat.server_args()
    moved = arguments.init_expert_location != "trivial" or arguments.enable_eplb
    return not moved and not arguments.ep_num_redundant_experts


def load_format() -> str:
    """The value of --load-format."""
    chosen = compat.server_args().load_format
    return str(getattr(chosen, "value", chosen))


def loads_saved_state() -> bool:
    """Whether SGLang is to load a state that it saved of a running model."""
    return load_format() == "sharded_state"


def local_experts(layer: Any) -> range:
    """The experts of the checkpoint of which a fused-MoE layer may keep any on this rank."""
    total: int = layer.num_experts
    if layer.moe_ep_size == 1 or not keeps_its_experts():
        return range(total)
    number = total // layer.moe_ep_size
    return range(layer.moe_ep_rank * number, (layer.moe_ep_rank + 1) * number)


def serves_adapters() -> bool:
    """Whether the user's flags ask for LoRA: SGLang turns it on by itself where adapters are named."""
    return bool(compat.server_args().enable_lora)
