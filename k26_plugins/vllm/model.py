"""Defines Kimi-K2.6 in vLLM: the in-tree model class, in which the core's parts take the place of vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform

from k26_plugins.common import metrics
from k26_plugins.common.adapters.ranks import require_everywhere
from k26_plugins.common.checkpoint import TensorSpec, account
from k26_plugins.common.checkpoint.engine_files import engine_files, is_under_way, with_mapped_files
from k26_plugins.common.checkpoint.saved_state import require_its_loader
from k26_plugins.common.experts import ExpertsError
from k26_plugins.common.experts.engine_test import note_files
from k26_plugins.common.experts.loading import is_needed, load_weights
from k26_plugins.common.experts.saving import in_checkpoint_form
from k26_plugins.common.settings import ENGINE, EXPERTS, MEDIA
from k26_plugins.vllm import compat, logger, names
from k26_plugins.vllm.engine_experts import watch_engine_experts
from k26_plugins.vllm.experts import experts_of, use_core_experts
from k26_plugins.vllm.files import readable_by_vllm
from k26_plugins.vllm.guesses import repeated
from k26_plugins.vllm.lora import NAMES, TakesAdapters, prepare_adapters
from k26_plugins.vllm.processing import K26MultiModalProcessor, K26ProcessingInfo

_in_tree = compat.in_tree_model()
_MEDIA = (
    (K26MultiModalProcessor, K26ProcessingInfo)
    if MEDIA.read() != ENGINE
    else (_in_tree.KimiK25MultiModalProcessor, _in_tree.KimiK25ProcessingInfo)
)


@MULTIMODAL_REGISTRY.register_processor(_MEDIA[0], info=_MEDIA[1], dummy_inputs=_in_tree.KimiK25DummyInputsBuilder)
class KimiK25ForConditionalGeneration(TakesAdapters, _in_tree.KimiK25ForConditionalGeneration):  # type: ignore[name-defined]
    """The in-tree model class with the core's experts, media and checks.

    It keeps the in-tree class's name, because vLLM compares names.
    """

    hf_to_vllm_mapper = _in_tree.KimiK25ForConditionalGeneration.hf_to_vllm_mapper | NAMES

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        require_everywhere("VLLM_PLUGINS")
        answer = vllm_config.model_config.k26_plugins
        metrics.report_to(answer.metrics_folder)
        self.core_config = answer.core_config
        setting = EXPERTS.read()
        if answer.saved_experts:
            require_its_loader(vllm_config.load_config.load_format)
        if self.core_config is not None and setting == ENGINE:
            if answer.saved_experts:
                raise ExpertsError(
                    f"this state was saved with the core's experts, which {EXPERTS.variable}={ENGINE} leaves out: unset it, "
                    f"or save one with vLLM's own."
                )
            logger.info("k26-plugins: vLLM's own INT4 experts are kept (%s chooses).", EXPERTS.variable)
        elif self.core_config is not None:
            required = setting != "auto" or current_platform.is_cpu() or answer.saved_experts
            use_core_experts(vllm_config, setting, required=required)
        if current_platform.is_cpu():
            compat.use_cpu_prefill_backend("k26_plugins.vllm.attention.K26CPUPrefillBackend")
            if vllm_config.speculative_config is not None:
                compat.ENGINE.hook(repeated, names.EXPAND_BATCH)
        prepare_adapters(vllm_config)
        compat.ENGINE.hook(whole_checkpoint, names.GET_ALL_WEIGHTS)
        compat.ENGINE.hook(files_of_checkpoint, names.SAFETENSORS_ITERATOR)
        compat.ENGINE.hook(saved_state, names.SAVE_MODEL)
        with readable_by_vllm(vllm_config.model_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        compat.keep_for_reloads(self)
        if vllm_config.load_config.load_format == "dummy":
            keep_constants(self.vision_tower)
        watch_engine_experts(self, self.core_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the whole checkpoint or any part of it, and return the names of the parameters that were loaded.

        Later calls update the weights of a running server (RLHF).
        """
        loaded: set[str] = load_weights(weights, self.core_config, experts_of(self), super().load_weights)
        return loaded


def keep_constants(module: torch.nn.Module) -> None:
    """Take a module's buffers out of its state dict, so that vLLM's loader of dummy weights leaves them alone.

    That loader fills every tensor of the state dict with random values. vLLM keeps the constants that normalize pixels
    in two buffers, which no later update of the weights would restore.
    """
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, buffer, persistent=False)


def saved_state(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    """Wrap vLLM's `ShardedStateLoader.save_model` so that a saved state has the experts as the checkpoint packs them.

    vLLM would save the parameters as a backend has repacked them for this machine.
    """
    with in_checkpoint_form(experts_of(model).values()):
        original(model, *args, **kwargs)


def whole_checkpoint(
    original: Callable[..., Iterable[tuple[str, torch.Tensor]]], loader: Any, model_config: Any, model: Any
) -> Iterable[tuple[str, torch.Tensor]]:
    """Wrap vLLM's `DefaultModelLoader.get_all_weights` so that every tensor of the checkpoint is accounted for.

    A tensor that is missing, repeated, unknown or of a wrong shape or dtype raises CheckpointError, but tensors that
    the loader's own filters leave out may be missing. By itself vLLM does not look for missing tensors of a quantized
    model (0.32). If the core has experts in the model, the core reads the files that the loader opens.
    """
    weights = original(loader, model_config, model)
    config = getattr(model, "core_config", None)
    if not isinstance(model, KimiK25ForConditionalGeneration) or config is None:
        return weights
    experts, left_out = compat.loader_filters(loader)
    if layers := experts_of(model):
        weights = with_mapped_files(
            weights, config, is_needed(layers, config), None if experts is None else len(experts)
        )

    def is_expected(spec: TensorSpec) -> bool:
        return (experts is None or spec.expert is None or spec.expert in experts) and not spec.name.startswith(left_out)

    return account(weights, config, is_expected)


def files_of_checkpoint(
    original: Callable[..., Iterable[tuple[str, torch.Tensor]]],
    files: list[str],
    use_tqdm: bool,
    strategy: str | None = None,
    local_expert_ids: set[int] | None = None,
    **prefetch: Any,
) -> Iterable[tuple[str, torch.Tensor]]:
    """Wrap vLLM's `safetensors_weights_iterator` so that the core reads the files of a checkpoint during its load.

    vLLM still reads them if the user chose another strategy than the lazy one, or if they lie on a network file system,
    from which vLLM reads ahead itself. Returns an iterator over (name, tensor).
    """
    note_files(files)
    if not is_under_way() or strategy not in (None, "lazy") or compat.reads_ahead_itself(files):
        return original(files, use_tqdm, strategy, local_expert_ids, **prefetch)
    return engine_files(sorted(files), logger, local_expert_ids)
