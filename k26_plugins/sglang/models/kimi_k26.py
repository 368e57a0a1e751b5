"""Kimi-K2.6 in SGLang: the in-tree class, with what the core defines put in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from typing import Any

import torch

from k26_plugins.common.checkpoint import account
from k26_plugins.common.checkpoint.engine_files import engine_files, is_under_way, with_mapped_files
from k26_plugins.common.config import K26Config
from k26_plugins.common.experts.loading import load_experts
from k26_plugins.common.ranks import require_everywhere
from k26_plugins.common.settings import experts_setting
from k26_plugins.sglang import compat, logger
from k26_plugins.sglang.experts import K26MoEScheme, chosen_backend, experts_of, use_core_experts
from k26_plugins.sglang.hybrid import K26HybridScheme, hybrid_settings
from k26_plugins.sglang.router import use_float32_logits

_in_tree = compat.in_tree_model()


class KimiK25ForConditionalGeneration(_in_tree.KimiK25ForConditionalGeneration):  # type: ignore[misc, name-defined]
    """Keeps the in-tree class' name: SGLang compares names."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "", **kwargs: Any) -> None:
        require_everywhere("SGLANG_PLUGINS")
        self.core_config = K26Config.from_dict(config.to_dict()) if config.k26_published_layout else None
        if compat.device_type() == "cpu":
            from k26_plugins.sglang.attention import K26TorchNativeAttnBackend

            compat.use_absorbed_mla_on_torch_native(K26TorchNativeAttnBackend)
        compat.hook_checkpoint_loader(whole_checkpoint, files_of_checkpoint)
        if self.core_config is None:
            super().__init__(config, quant_config, prefix, **kwargs)
        else:
            hybrid = hybrid_settings(self.core_config)
            make_scheme = K26MoEScheme if hybrid is None else partial(K26HybridScheme, settings=hybrid)
            by_name = hybrid is not None or experts_setting() != "auto"
            use_core_experts(quant_config, chosen_backend(hybrid=hybrid is not None), make_scheme, by_name=by_name)
            with compat.without_kt_wrapper():
                super().__init__(config, quant_config, prefix, **kwargs)
            use_float32_logits(self)
        # A float32 buffer, which would make all that it is added to float32: no image meets it, only videos do.
        position = self.vision_tower.patch_embed.pos_emb
        position.time_weight = position.time_weight.to(position.weight.dtype)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """All of the checkpoint, or any part of it: what is loaded later updates a running server (RLHF)."""
        compat.forget_media_embeddings()
        layers = experts_of(self)
        if not layers:
            return super().load_weights(weights)
        assert self.core_config is not None, "the core's experts are of the published layout"
        with closing(load_experts(weights, self.core_config, layers)) as others:
            return super().load_weights(others)


def whole_checkpoint(
    original: Callable[..., Any], model: Any, weights: Iterable[tuple[str, torch.Tensor]], target_device: Any
) -> Any:
    """What SGLang's loader of checkpoints gives a model, accounted for: it promises the whole, at a start or an update."""
    config = getattr(model, "core_config", None)
    if isinstance(model, KimiK25ForConditionalGeneration) and config is not None:
        if layers := experts_of(model):
            weights = with_mapped_files(weights, config, layers)
        weights = account(weights, config)
    return original(model, weights, target_device)


def files_of_checkpoint(
    original: Callable[..., Any], files: list[str], *args: Any, disable_mmap: bool = False, **kwargs: Any
) -> Any:
    """The tensors of safetensors files; a way to read them that the user chose stays SGLang's."""
    chosen = disable_mmap or kwargs.get("prefetch") or kwargs.get("drop_cache_after_load")
    if chosen or not is_under_way():
        return original(files, *args, disable_mmap=disable_mmap, **kwargs)
    return engine_files(files, logger)


EntryClass = [KimiK25ForConditionalGeneration]
