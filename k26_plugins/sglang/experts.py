"""Brings the core's INT4 experts into SGLang's fused-MoE layers, as a compressed-tensors scheme (`K26MoEScheme`)."""

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

# What was wrong with SGLang's own experts, if this process found them wrong: from then on it takes the core's.
_wrong: str | None = None
# The value of --load-format under which SGLang reads weights that were saved repacked.
PRESHARDED = "presharded"


class K26MoEScheme(compat.moe_scheme_base()):  # type: ignore[misc]
    """The scheme of one fused-MoE layer whose routed experts the core computes.

    It creates the weights in the checkpoint's packed form. After they are loaded, a backend of the core repacks them in
    place.
    """

    experts: LayerExperts
    on_host: LayerExperts
    """The experts that may be in host memory: here all of the layer's, which are there if the device is a CPU."""
    is_awaited = False
    """Whether a saved state is still to be loaded into the parameters. SGLang calls `process_weights_after_loading`
    before it loads one, which must not repack the empty parameters."""

    def __init__(self, backend_name: str) -> None:
        self.backend_name = backend_name

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0, because the core's experts need no compute capability of a GPU."""
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
        """Create the layer's parameters in the checkpoint's packed form."""
        sizes = (num_experts, hidden_size, intermediate_size_per_partition)
        # The number of global experts is None, because SGLang's dispatcher hands over local ids.
        self.batches = Batches(layer.top_k, None, params_dtype, logger)
        self.experts = LayerExperts(layer, *sizes, self.backend_name, loader_attributes(extra_weight_attrs))
        self.on_host = self.experts

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """Create no runner of SGLang's, so that its dispatcher hands over local ids, −1 for experts of other ranks."""
        self.output_scale = moe_runner_config.routed_scaling_factor if compat.experts_scale_output() else None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Give the loaded parameters to the backend, unless an update of the weights has yet to end."""
        if not self.is_awaited:
            self.close()

    def places(self, layer: Any) -> Places | None:
        """Return where this rank keeps the layer's experts, or None if SGLang moves or copies experts between ranks."""
        if not compat_loading.keeps_its_experts():
            return None
        local = compat_loading.local_experts(layer)

        def slots(expert: int) -> list[tuple[int, int]]:
            return [(0, expert - local.start)] if expert in local else []

        return Places([self.experts], slots, layer.moe_tp_rank, layer.moe_tp_size)

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Restore the checkpoint's packed form. SGLang calls this before an update of the weights."""
        self.open()

    def open(self) -> bool:
        """Bring the parameters into the checkpoint's packed form, and return whether they were in another."""
        return self.experts.open()

    def close(self) -> None:
        """Have the backend repack the loaded parameters, after its self-test with them."""
        self.experts.close(self.batches)

    def apply_weights(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        """Return the routed sum of SGLang's dispatched tokens, as its combiner takes it."""
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
        """Write the weighted sum of each token's routed experts to `out`.

        out, hidden_states: [tokens, hidden size]. topk_weights, topk_ids: [tokens, top_k], ids local to this rank, −1
        for an expert of another rank.
        """
        self.experts.apply(out, hidden_states, topk_weights, topk_ids)


def _layers_of(model: torch.nn.Module) -> list[Any]:
    """Return the layers of a model whose experts `K26MoEScheme` serves."""
    return [module for module in model.modules() if isinstance(getattr(module, "scheme", None), K26MoEScheme)]


def schemes_of(model: torch.nn.Module) -> list[K26MoEScheme]:
    """Return the `K26MoEScheme` of each layer of a model that has one."""
    return [layer.scheme for layer in _layers_of(model)]


def experts_of(model: torch.nn.Module) -> dict[int, ExpertsOfLayer]:
    """Return the layers of a model whose experts `K26MoEScheme` serves, by the number of the layer."""
    # An expert has one physical id: SGLang's weight loader takes the checkpoint's ids and finds EPLB's copies itself.
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
    """Make this model's quantization configuration return the core's scheme for routed experts.

    All other layers keep SGLang's schemes. backend_name: what `chosen_backend` returned. make_scheme: returns the
    scheme of one layer for a backend's name; it is not called where SGLang's own experts serve. by_name: whether no
    other experts may take the place of the core's. Raises UnsupportedEngineError if SGLang read the checkpoint's
    quantization as another one than compressed-tensors.
    """
    engine = f"SGLang {compat.sglang_version()}"
    require_config(quant_config, compat.compressed_tensors_config(), engine, "remove --quantization")

    def ours(layer: torch.nn.Module) -> K26MoEScheme | None:
        sizes, serves = partial(sizes_of, layer), partial(core_serves, layer, by_name=by_name)
        name = backend_of_layer(backend_name, sizes, "sglang", logger, by_name=by_name, serves=serves)
        return None if name is None else make_scheme(name)

    answer_with(quant_config, names.GET_MOE_SCHEME.attribute, ours)


def sizes_of(layer: Any) -> LayerSizes:
    """Return the sizes of this rank's part of a layer whose weights are about to be created on the default device."""
    sizes = (layer.num_local_experts, layer.hidden_size, layer.intermediate_size_per_partition)
    return LayerSizes(*sizes, torch.get_default_device())


def core_serves(layer: Any, backend_name: str, *, by_name: bool) -> bool:
    """Return whether the core's experts can serve a fused-MoE layer as SGLang runs it here.

    The layer's weights do not exist yet. If the experts cannot serve the layer, it is left to SGLang. Raises
    ExpertsError instead if no others may serve it, because of `by_name` or because SGLang's own were found wrong.
    """
    sizes = sizes_of(layer)
    reason = why_unsupported(sizes, backend_name)
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
    return core_serves_layer(logger, "SGLang", backend_name, sizes.device, reason)


def leave_engine_experts(wrong: str) -> None:
    """Have models that this process builds from now on take the core's experts in the place of SGLang's own.

    wrong: what is wrong with SGLang's, for messages.
    """
    global _wrong
    _wrong = wrong


def has_left_engine_experts() -> bool:
    """Return whether this process found SGLang's own experts wrong and takes the core's."""
    return _wrong is not None


def chosen_backend(*, hybrid: bool, saved: bool = False) -> str:
    """Return which experts K26_EXPERTS and `--moe-runner-backend` choose.

    The result is the name of a backend of the core, ENGINE for SGLang's own experts, or `auto`, which each layer
    resolves for its device. If SGLang itself chose a runner for this GPU and checkpoint, SGLang's experts serve, unless
    K26_EXPERTS names others. hybrid: whether this is a hybrid run, whose experts are the core's on GPUs and CPU. saved:
    whether the checkpoint is a state that was saved with the core's experts, which no others can read. Raises
    ValueError if the user's choices contradict each other.
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
    # If `given` is None, the flag may be SGLang's own choice. Then the variable wins, which the user certainly set.
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
