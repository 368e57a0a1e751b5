"""Defines Kimi-K2.6 in SGLang: the in-tree model class, in which the core's parts take the place of SGLang's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.adapters.ranks import require_everywhere
from k26_plugins.common.checkpoint import account
from k26_plugins.common.checkpoint.engine_files import engine_files, is_under_way, with_mapped_files
from k26_plugins.common.checkpoint.mapped import mapped_tensors
from k26_plugins.common.checkpoint.saved_state import require_its_loader
from k26_plugins.common.checkpoint.watched import watched_files
from k26_plugins.common.experts.engine_test import files_read, note_files
from k26_plugins.common.experts.loading import is_needed, load_weights
from k26_plugins.common.experts.saving import in_checkpoint_form
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.settings import ENGINE, EXPERTS, MEDIA
from k26_plugins.sglang import compat, compat_encoder, compat_loading, encoder, logger, names
from k26_plugins.sglang.engine_experts import WrongExpertsError, watch_engine_experts
from k26_plugins.sglang.experts import (
    K26MoEScheme,
    chosen_backend,
    experts_of,
    has_left_engine_experts,
    leave_engine_experts,
    schemes_of,
    use_core_experts,
)
from k26_plugins.sglang.hybrid import HybridError, K26HybridScheme, hybrid_settings
from k26_plugins.sglang.lora import refuse_unserved
from k26_plugins.sglang.router import use_float32_logits

_in_tree = compat.in_tree_model()

# Names that SGLang, in some releases or in all, looks up on the model that it serves, and that only the language model
# has. The names that prefill with context parallelism looks up are left out on purpose: it calls the decoder itself,
# and would ignore images.
OF_LANGUAGE_MODEL = frozenset(
    {
        "end_layer",
        "get_embed_and_head",
        "lm_head",
        "logits_processor",
        "num_fused_shared_experts",
        "prepare_context_parallel_metadata_for_dcp",
        "routed_experts_weights_of_layer",
        "set_eagle3_layers_to_capture",
        "set_embed_and_head",
        "start_layer",
    }
)


class KimiK25ForConditionalGeneration(_in_tree.KimiK25ForConditionalGeneration):  # type: ignore[name-defined]
    """The in-tree model class with the core's experts, router and checks.

    It keeps the in-tree class's name, because SGLang compares names.
    """

    # SGLang looks this up on the class, before there is a model, and adds to it.
    packed_modules_mapping = compat.language_model().packed_modules_mapping

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "", **kwargs: Any) -> None:
        if not has_left_engine_experts():
            # A model that is built again (`build_again`) has passed this check, and other ranks may keep their model.
            require_everywhere("SGLANG_PLUGINS")
        self._built_from = (config, quant_config, prefix, kwargs)
        self.left_out: set[str] = set()
        self.core_config = K26Config.from_dict(config.to_dict()) if config.k26_published_layout else None
        if compat.device_type() == "cpu":
            from k26_plugins.sglang.attention import K26TorchNativeAttnBackend

            compat.use_absorbed_mla_on_torch_native(K26TorchNativeAttnBackend)
        compat.ENGINE.hook(whole_checkpoint, names.LOAD_CHECKPOINT)
        compat.ENGINE.hook(files_of_checkpoint, names.SAFETENSORS_ITERATOR, names.BUFFERED_ITERATOR)
        compat.ENGINE.hook(saved_state, names.SAVE_MODEL)
        if getattr(config, "language_only", False) and compat_encoder.encodes_here_too():
            # Otherwise SGLang would not load the vision tower's weights, and would encode with random ones.
            config.language_only = False
        if self.core_config is None:
            super().__init__(config, quant_config, prefix, **kwargs)
        else:
            hybrid = hybrid_settings(self.core_config)
            make_scheme = K26MoEScheme if hybrid is None else partial(K26HybridScheme, settings=hybrid)
            saved = config.k26_saved_experts
            if saved:
                require_its_loader(compat_loading.load_format())
            by_name = hybrid is not None or saved or EXPERTS.read() != "auto" or has_left_engine_experts()
            chosen = chosen_backend(hybrid=hybrid is not None, saved=saved)
            use_core_experts(quant_config, chosen, make_scheme, by_name=by_name)
            with compat.without_kt_wrapper():
                super().__init__(config, quant_config, prefix, **kwargs)
            use_float32_logits(self)
            for scheme in schemes_of(self):
                scheme.is_awaited = compat_loading.loads_saved_state()
            if experts_of(self) and compat_loading.serves_adapters():
                compat.ENGINE.hook(refuse_unserved, names.LORA_WEIGHT)
        watch_engine_experts(self, self.core_config)
        if getattr(config, "encoder_only", False) and MEDIA.read() != ENGINE and compat_encoder.asks_the_model():
            self.preprocess_mm_for_encoder = encoder.prepare_by_core()
            self.encoder_media_processor_config = compat_encoder.in_its_threads()
        # This buffer is float32 and would turn the sum that it is a part of into float32. It is added for videos only.
        position = self.vision_tower.patch_embed.pos_emb
        position.time_weight = position.time_weight.to(position.weight.dtype)

    @wraps(_in_tree.KimiK25ForConditionalGeneration.forward)
    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute a step, also for a prompt that is given as embeddings.

        Embeddings go to the language model directly, because the in-tree class takes none and would end SGLang's
        scheduler.
        """
        input_embeds = kwargs.pop("input_embeds", None)
        if input_embeds is None:
            return super().forward(input_ids, positions, forward_batch, *args, **kwargs)
        return self.language_model(input_ids, positions, forward_batch, input_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load the whole checkpoint or any part of it. Later calls update the weights of a running server (RLHF)."""
        self.left_out = set()
        compat.forget_media_embeddings()
        layers = experts_of(self)
        # The files are watched here too: SGLang's threads still copy from them after the last tensor was handed over.
        with watched_files() if layers else nullcontext():
            return load_weights(weights, self.core_config, layers, super().load_weights)

    def post_load_weights(self) -> None:
        """Repack the experts of a saved state, and complete the language model's weights.

        SGLang calls this where it loaded a saved state, or where weights came by another way than `load_weights`.
        """
        for scheme in schemes_of(self):
            if scheme.is_awaited:
                scheme.is_awaited = False
                scheme.close()
        language_model = getattr(self, "language_model", None)
        if language_model is not None:
            language_model.post_load_weights()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the language model for the names in `OF_LANGUAGE_MODEL`.

        Python calls this for names that neither this class nor the in-tree class has.
        """
        language_model = self.__dict__.get("_modules", {}).get("language_model")
        if name in OF_LANGUAGE_MODEL and language_model is not None:
            return getattr(language_model, name)
        return super().__getattr__(name)

    def should_apply_lora(self, module_name: str) -> bool:
        """Return whether SGLang may put LoRA adapters on a module.

        On the core's experts it may not: SGLang would put its own experts in their place.
        """
        return not (experts_of(self) and module_name.endswith(".mlp.experts"))

    def generate_weight_name_filter(self, experts: dict[int, list[int]]) -> Callable[[str], bool]:
        """Return a function that says whether SGLang is to read a tensor again after a rank was lost.

        experts: the numbers of the lost experts by layer. Without this method SGLang would read all tensors again.
        """
        is_wanted = self.language_model.generate_weight_name_filter(experts)

        def is_read(name: str) -> bool:
            if not is_wanted(name):
                self.left_out.add(name)
                return False
            return True

        return is_read


def saved_state(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap SGLang's `ShardedStateLoader.save_model` so that a saved state has the experts as the checkpoint packs them.

    SGLang would save the parameters as a backend repacked them for this machine. Raises HybridError for a hybrid run.
    """
    if any(isinstance(scheme, K26HybridScheme) for scheme in schemes_of(model)):
        raise HybridError(
            "a hybrid run's experts are on both sides, and a saved state would have those of the device only."
        )
    with in_checkpoint_form(experts_of(model).values()):
        original(model, *args, **kwargs)


def whole_checkpoint(
    original: Callable[..., Any], model: Any, weights: Iterable[tuple[str, torch.Tensor]], target_device: Any
) -> Any:
    """Wrap SGLang's `load_weights_and_postprocess` so that every tensor of a whole checkpoint is accounted for.

    SGLang calls that function with a whole checkpoint, at a start or at an update. A tensor that is missing, repeated,
    unknown or of a wrong shape or dtype raises CheckpointError. If the core has experts in the model, the core reads
    the files. If SGLang's own experts turn out to be wrong, the model is built and loaded again with the core's.
    """
    config = getattr(model, "core_config", None)
    if isinstance(model, KimiK25ForConditionalGeneration) and config is not None:
        layers = experts_of(model)
        # A server of the encoder alone (it has no language model) would by itself read all experts and drop them.
        if layers or model.language_model is None:
            weights = with_mapped_files(weights, config, is_needed(layers, config))
        weights = account(weights, config, lambda spec: spec.name not in model.left_out)
    try:
        return original(model, weights, target_device)
    except WrongExpertsError as error:
        wrong = str(error)
    # The exception, which holds the loaded layers through its traceback, is gone here: only the model still holds them.
    logger.warning("k26-plugins: %s. The core's take their place: the model is built and loaded again.", wrong)
    leave_engine_experts(wrong)
    files = [Path(file) for file in files_read]
    build_again(model, target_device)
    return whole_checkpoint(original, model, mapped_tensors(files), target_device)


def build_again(model: KimiK25ForConditionalGeneration, target_device: torch.device) -> None:
    """Build a model again in the same object, as SGLang's loader built it, without weights."""
    config, quant_config, prefix, kwargs = model._built_from
    # The old layers are freed before the new ones take memory.
    torch.nn.Module.__init__(model)
    gc.collect()
    with target_device:
        model.__init__(config, quant_config, prefix, **kwargs)  # type: ignore[misc]


def files_of_checkpoint(
    original: Callable[..., Any], files: list[str], *args: Any, disable_mmap: bool = False, **kwargs: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """Wrap SGLang's iterators over safetensors files so that the core reads the files of a checkpoint during its load.

    SGLang still reads them if the user chose a way to read them. Returns an iterator over (name, tensor).
    """
    note_files(files)
    chosen = disable_mmap or kwargs.get("prefetch") or kwargs.get("drop_cache_after_load")
    # An update opens the files before its load is under way. As this is a generator, the question is only asked when
    # the first tensor is wanted.
    if chosen or not is_under_way():
        yield from original(files, *args, disable_mmap=disable_mmap, **kwargs)
    else:
        yield from engine_files(files, logger)
