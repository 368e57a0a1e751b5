"""The core's INT4 experts through SGLang's compressed-tensors interface: a scheme for its fused-MoE layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from k26_plugins.common.adapters.experts import answer_with, backend_of_layer, core_serves_layer, require_config
from k26_plugins.common.experts import ExpertsError, why_unsupported
from k26_plugins.common.experts.base import Batches, LayerSizes
from k26_plugins.common.experts.engine_test import stop
from k26_plugins.common.experts.loading import ExpertsOfLayer, Places
from k26_plugins.common.experts.parameters import LayerExperts, loader_attributes
from k26_plugins.common.experts.triton import TritonExperts
from k26_plugins.common.settings import ENGINE, EXPERTS
from k26_plugins.sglang import compat, compat_loading, logger, names

# What was wrong with SGLang's own experts where this process found them so: it takes the core's from then on.
_wrong: str | None = None
# A value of --load-format.
PRESHARDED = "presharded"


class K26MoEScheme(compat.moe_scheme_base()):  # type: ignore[misc]
    """Creates the packed weights as the checkpoint has them; after loading, a core backend repacks them in place."""

    experts: LayerExperts
    on_host: LayerExperts
    """The experts that may be in the host's memory: here all of them, if the device is the host."""
    is_awaited = False
    """Whether a saved state is to be loaded into the parameters yet, which SGLang calls processed before."""

    def __init__(self, backend_name: str) -> None:
        self.backend_name = backend_name

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        # SGLang's dispatcher gives local ids.
        self.batches = Batches(layer.top_k, None, params_dtype, logger)
        self.experts = LayerExperts(layer, *sizes, self.backend_name, loader_attributes(extra_weight_attrs))
        self.on_host = self.experts

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """No runner of SGLang's: its dispatcher then gives local ids, −1 for an expert of another rank."""
        self.output_scale = moe_runner_config.routed_scaling_factor if compat.experts_scale_output() else None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if not self.is_awaited:
            self.close()

    def places(self, layer: Any) -> Places | None:
        """Where SGLang's loader of a parameter puts the experts; None where it asks for each."""
        if not compat_loading.keeps_its_experts():
            return None
        local = compat_loading.local_experts(layer)

        def slots(expert: int) -> list[tuple[int, int]]:
            return [(0, expert - local.start)] if expert in local else []

        return Places([self.experts], slots, layer.moe_tp_rank, layer.moe_tp_size)

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Called by SGLang before an update of the weights; `process_weights_after_loading` ends it."""
        self.open()

    def open(self) -> bool:
        """Make the parameters as the checkpoint packs them; whether they were not."""
        return self.experts.open()

    def close(self) -> None:
        """Make them as the backend repacks them."""
        self.experts.close(self.batches)

    def apply_weights(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        hidden_states = dispatch_output.hidden_states
        topk_weights, topk_ids, _ = dispatch_output.topk_output
        if self.output_scale is not None:
            topk_weights = topk_weights * self.output_scale
        output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        self.compute(output, hidden_states, topk_weights, topk_ids)
        return compat.combine_input(output)

    def compute(
        self, out: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> None:
        """Write the routed sum to `out`."""
        self.experts.apply(out, hidden_states, topk_weights, topk_ids)


def _layers_of(model: torch.nn.Module) -> list[Any]:
    """The layers of a model whose experts our scheme loads."""
    return [module for module in model.modules() if isinstance(getattr(module, "scheme", None), K26MoEScheme)]


def schemes_of(model: torch.nn.Module) -> list[K26MoEScheme]:
    """The schemes of the layers whose experts our scheme loads."""
    return [layer.scheme for layer in _layers_of(model)]


def experts_of(model: torch.nn.Module) -> dict[int, ExpertsOfLayer]:
    """The layers of a model whose experts our scheme loads, by their number."""
    # SGLang's loader of a parameter takes the checkpoint's ids, and knows the copies of EPLB itself.
    return {
        module.layer_id: ExpertsOfLayer(
            module,
            module.scheme.on_host,
            module.scheme.open,
            module.scheme.close,
            lambda expert: (expert,),
            compat_loading.local_experts(module).__contains__,
            module.scheme.places(module),
        )
        for module in _layers_of(model)
    }


def use_core_experts(
    quant_config: Any, backend_name: str, make_scheme: Callable[[str], K26MoEScheme], *, by_name: bool
) -> None:
    """Give this model's quantization configuration our scheme for routed experts, and leave the rest of it alone.

    backend_name: as `chosen_backend` gives it. make_scheme: from a backend's name, one for each layer; not called for the
    name of SGLang's own experts. by_name: no other experts may take the place of the core's.
    """
    engine = f"SGLang {compat.sglang_version()}"
    require_config(quant_config, compat.compressed_tensors_config(), engine, "remove --quantization")

    def ours(layer: torch.nn.Module) -> K26MoEScheme | None:
        sizes, serves = partial(sizes_of, layer), partial(core_serves, layer, by_name=by_name)
        name = backend_of_layer(backend_name, sizes, "sglang", logger, by_name=by_name, serves=serves)
        return None if name is None else make_scheme(name)

    answer_with(quant_config, names.GET_MOE_SCHEME.attribute, ours)


def sizes_of(layer: Any) -> LayerSizes:
    """The sizes of this rank's part of a layer whose weights are about to be created."""
    sizes = (layer.num_local_experts, layer.hidden_size, layer.intermediate_size_per_partition)
    return LayerSizes(*sizes, torch.get_default_device())


def core_serves(layer: Any, backend_name: str, *, by_name: bool) -> bool:
    """Whether the core's experts can serve a fused-MoE layer as SGLang runs it here; asked before its weights are created.

    Raises ExpertsError where they cannot and nothing else may, `by_name`; otherwise the layer is left to SGLang.
    """
    reason = why_unsupported(sizes_of(layer), backend_name)
    all_to_all = compat.moe_all_to_all()
    if not all_to_all.is_none():
        reason = (
            f"--moe-a2a-backend {all_to_all.value} hands over tokens sorted by expert, and they take tokens with their "
            f"routing: leave that flag out"
        )
    if compat_loading.load_format() == PRESHARDED:
        reason = (
            f"--load-format {PRESHARDED} keeps weights as one backend and one CPU have them repacked, without saying which: "
            f"leave that flag out, or save a state (--load-format sharded_state)"
        )
    if reason is not None and _wrong is not None:
        stop(_wrong, reason)
    if reason is not None and by_name:
        raise ExpertsError(
            f"the core's experts ({backend_name}) cannot serve here: {reason}. Or unset {EXPERTS.variable} and the --kt "
            f"flags for SGLang's own."
        )
    return core_serves_layer(logger, "SGLang", backend_name, reason)


def leave_engine_experts(wrong: str) -> None:
    """Have models that this process builds from now on take the core's experts in the place of SGLang's own."""
    global _wrong
    _wrong = wrong


def has_left_engine_experts() -> bool:
    return _wrong is not None


def chosen_backend(*, hybrid: bool, saved: bool = False) -> str:
    """The experts that K26_EXPERTS and `--moe-runner-backend` choose: a core backend's name, ENGINE for SGLang's own, or
    `auto`, which each layer resolves for its device.

    A runner that SGLang itself chose for this GPU and checkpoint stands unless K26_EXPERTS names others. A hybrid run's
    experts are the core's on both sides, and so are those of a state `saved` with them. Raises ValueError where what the
    user gave contradicts itself.
    """
    if _wrong is not None:
        return TritonExperts.name if compat.device_type() == TritonExperts.device_type else "auto"
    runner, given, setting = compat.moe_runner_backend(), compat.given_runner(), EXPERTS.read()
    flag = given if given is not None else runner.value
    by_flag = flag != "auto"
    if hybrid and (setting == ENGINE or by_flag):
        raise ValueError(
            f"a hybrid run's experts are the core's on both sides: leave out --moe-runner-backend and "
            f"{EXPERTS.variable}={ENGINE}, or give SGLANG_PLUGINS=none for KTransformers' own."
        )
    if saved and (setting == ENGINE or (setting == "auto" and not runner.is_auto())):
        raise ValueError(
            f"this state was saved with the core's experts: set {EXPERTS.variable} to the backend for this device, or save "
            f"one with SGLang's own."
        )
    # Where the flag is not known apart from SGLang's own choice, the variable is what the user surely gave.
    if given is not None and by_flag and setting not in ("auto", ENGINE):
        raise ValueError(
            f"{EXPERTS.variable}={setting} and --moe-runner-backend {flag} choose different experts: give one of the two."
        )
    if not hybrid and setting == "auto" and not runner.is_auto():
        chooser = "--moe-runner-backend" if by_flag else "SGLang chooses"
        logger.info("k26-plugins: SGLang's own INT4 experts are kept (%s %s).", chooser, runner.value)
        return ENGINE
    if setting == ENGINE:
        logger.info("k26-plugins: SGLang's own INT4 experts are kept (%s chooses).", EXPERTS.variable)
    return setting
