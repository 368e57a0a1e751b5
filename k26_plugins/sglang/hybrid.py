"""Serves hybrid runs in SGLang: reads the `--kt-…` flags, and has the core compute some experts on the device and the
others, which stay in host memory, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k26_plugins.common.checkpoint import expert_bytes
from k26_plugins.common.experts import BACKENDS
from k26_plugins.common.experts.base import Batches, LayerSizes
from k26_plugins.common.experts.deferred import Deferral
from k26_plugins.common.experts.hybrid import FEW_TOKENS, HybridExperts
from k26_plugins.common.experts.loading import Places
from k26_plugins.common.experts.moving import Uses
from k26_plugins.common.experts.native import NativeExperts
from k26_plugins.common.experts.native.threads import process_threads
from k26_plugins.common.experts.op import held_experts, number_of
from k26_plugins.common.experts.parameters import LayerExperts, loader_attributes
from k26_plugins.common.experts.placement import PROFILE_FILE, LayerPlacement, Profile, place
from k26_plugins.common.experts.streamed import SUM_DTYPE
from k26_plugins.common.experts.streaming import Streaming
from k26_plugins.common.host import cores
from k26_plugins.common.host.device_runtime import DeviceRuntime, DeviceRuntimeError, device_runtime
from k26_plugins.common.host.memory import require_host_memory
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.model.int4 import GROUP_SIZE
from k26_plugins.common.settings import BATCH_INVARIANT, CPU_EXPERTS, EXPERTS, MOVE_EXPERTS, STREAM_FROM
from k26_plugins.sglang import compat, compat_loading, logger, names
from k26_plugins.sglang.arguments import refuse_two_batches
from k26_plugins.sglang.experts import K26MoEScheme

DEFERRED_FLAG = "--kt-max-deferred-experts-per-token"
# The accepted values of `--kt-method`. AMXINT4 is upstream SGLang's default, so a user may not have chosen it.
METHODS = (None, "RAWINT4", "AMXINT4")


class HybridError(ValueError):
    """A hybrid run would not fit into memory or would give wrong results. The message names the flag and the remedy."""


@dataclass(frozen=True, slots=True)
class HybridSettings:
    """The settings of a hybrid run, which all layers of a model share."""

    num_experts: int
    num_device_experts: int
    """The number of experts of each layer that the device holds."""
    profile: Profile | None
    host_backend: str
    streaming: Streaming | None
    runtime: DeviceRuntime | None
    """The device's runtime if the CPU's experts run as work in the device's stream, otherwise None."""
    deferral: Deferral | None
    uses: Uses

    def placement(self, layer: int) -> LayerPlacement:
        """Return which experts of a layer are on the device and which on the CPU. layer: its number in the model."""
        counts = self.profile.counts[layer] if self.profile is not None else None
        return place(self.num_experts, self.num_device_experts, counts)


def hybrid_settings(config: K26Config) -> HybridSettings | None:
    """Return the settings that the server's `--kt-…` flags ask for, or None without such flags.

    With the flags, this also limits the CPU cores of this process (--kt-cpuinfer) and puts a hook around the results of
    batches. Raises HybridError, PlacementError or HostMemoryError for a run that would give wrong results or not fit
    into memory.
    """
    arguments = compat.server_args()
    if getattr(arguments, "kt_weight_path", None) is None:
        return None
    _refuse(arguments)
    num_experts = config.text.n_routed_experts
    ratio = getattr(arguments, "kt_gpu_experts_ratio", None)
    on_device = arguments.kt_num_gpu_experts if ratio is None else int(ratio * num_experts)
    if on_device is None:
        raise HybridError("--kt-weight-path needs --kt-num-gpu-experts: how many experts of each layer the GPUs hold.")
    file = Path(arguments.model_path) / PROFILE_FILE
    profile = Profile.load(file, config) if file.exists() else None
    host_backend = CPU_EXPERTS.read()
    runtime = _runtime(arguments, host_backend)
    last_layer = config.text.num_hidden_layers - 1
    deferral = _deferral(arguments, last_layer)
    uses = Uses(logger, _moves(arguments, host_backend))
    batches = Batches(config.text.num_experts_per_tok, num_experts, SUM_DTYPE, logger)
    streaming = _streaming(arguments, batches)
    settings = HybridSettings(num_experts, on_device, profile, host_backend, streaming, runtime, deferral, uses)
    settings.placement(last_layer)  # this raises PlacementError for an impossible number of experts
    _require_memory(arguments, config, num_experts - on_device)
    ranks = max(1, arguments.tp_size // arguments.nnodes)
    if arguments.kt_cpuinfer is not None:
        cores.share(max(1, arguments.kt_cpuinfer // ranks))
    logger.info(
        "k26-plugins: hybrid run, %d of %d experts of each layer on the device (%s), the others on the CPU (%s).",
        on_device,
        num_experts,
        "the first" if profile is None else f"by {file.name}, {profile.hit_rate(on_device):.0%} of its uses",
        settings.host_backend,
    )
    global _settings
    _settings = settings
    compat.ENGINE.hook(complete_results, names.BATCH_RESULT)
    return settings


def _streaming(arguments: Any, batches: Batches) -> Streaming | None:
    stream_from = STREAM_FROM.read()
    if stream_from == "never":
        return None
    # sglang-kt's flag means the same: for batches of at least so many tokens sglang-kt streams all experts.
    number = stream_from if isinstance(stream_from, int) else getattr(arguments, "kt_gpu_prefill_token_threshold", None)
    return Streaming(EXPERTS.read(), number, batches)


def _deferral(arguments: Any, last_layer: int) -> Deferral | None:
    """Return the deferral of experts that the flag asks for, or None if it asks for none.

    Raises HybridError if experts cannot be deferred: a layer must directly follow the one before it, in the same
    process.
    """
    flag, per_token = DEFERRED_FLAG, getattr(arguments, "kt_max_deferred_experts_per_token", None) or 0
    if per_token == 0:
        return None
    if per_token < 0:
        raise HybridError(f"{flag} is {per_token}: give a number of experts, or leave it out.")
    if arguments.pp_size > 1:
        raise HybridError(f"{flag} hands experts from a layer to the next: leave it out, or --pp-size.")
    if BATCH_INVARIANT.read():
        raise HybridError(f"{flag} defers none in long batches, and {BATCH_INVARIANT.variable} asks for no difference.")
    logger.warning(
        "k26-plugins: %s %d changes answers: in batches of at most %d tokens the %d least weighted of a token's experts, "
        "where they are on the CPU, are added one layer later than the model has them. By how much nobody has measured on "
        "Kimi-K2.6; docs/hybrid.md has it of a small random model.",
        flag,
        per_token,
        FEW_TOKENS,
        per_token,
    )
    return Deferral(per_token, last_layer)


def _moves(arguments: Any, host_backend: str) -> bool:
    """Return whether experts move while serving, as sglang-kt's flag or K26_MOVE_EXPERTS asks.

    Raises HybridError if the CPU's backend cannot move them.
    """
    flag = "--kt-enable-dynamic-expert-update"
    if not (getattr(arguments, "kt_enable_dynamic_expert_update", False) or MOVE_EXPERTS.read()):
        return False
    if host_backend not in ("auto", *BACKENDS):
        raise HybridError(
            f"{CPU_EXPERTS.variable}={host_backend} keeps its weights to itself, so that none can move: leave out {flag} "
            f"and {MOVE_EXPERTS.variable}, or that backend."
        )
    return True


def _refuse(arguments: Any) -> None:
    if Path(arguments.kt_weight_path).resolve() != Path(arguments.model_path).resolve():
        raise HybridError(
            f"--kt-weight-path is {arguments.kt_weight_path}, --model-path {arguments.model_path}: k26-plugins reads the "
            f"experts of both sides from the one INT4 checkpoint, give it twice."
        )
    if compat_loading.loads_saved_state():
        raise HybridError(
            "--load-format sharded_state reads an engine's own parameters, and a hybrid run's experts come of the published "
            "files: leave it out."
        )
    method = getattr(arguments, "kt_method", None)
    if method not in METHODS:
        raise HybridError(f"--kt-method {method} needs converted weights: give RAWINT4, the checkpoint's own format.")
    refuse_two_batches(arguments)
    if arguments.ep_size > 1 or getattr(arguments, "enable_eplb", False):
        # `ep_size` covers --moe-a2a-backend too, because with an all-to-all SGLang sets the size of expert parallelism.
        raise HybridError(
            "a hybrid run places experts itself: leave out --ep-size, --moe-a2a-backend and --enable-eplb, use --tp-size."
        )


def _runtime(arguments: Any, host_backend: str) -> DeviceRuntime | None:
    """Return the device's runtime, or None if the device is the CPU or the host waits for the CPU's experts in each
    layer.

    Raises HybridError if the host has to wait and CUDA graphs are on, because a graph cannot hold such a wait.
    """
    if compat.device_type() == "cpu":
        return None
    if host_backend in ("auto", NativeExperts.name):
        reason = NativeExperts.unsupported(LayerSizes(1, GROUP_SIZE, GROUP_SIZE, torch.device("cpu")))
    else:
        reason = f"{CPU_EXPERTS.variable}={host_backend} has no other way"
    if reason is None:
        try:
            return device_runtime()
        except DeviceRuntimeError as error:
            reason = str(error)
    if not arguments.disable_cuda_graph:
        raise HybridError(
            f"this hybrid run waits on the CPU, which a CUDA graph cannot hold: {reason}. Add --disable-cuda-graph."
        )
    return None


# The settings of the model that this process built last; `complete_results` reads them.
_settings: HybridSettings | None = None


def complete_results(original: Callable[..., Any], scheduler: Any, batch: Any, result: Any) -> Any:
    """Wrap SGLang's `process_batch_result` so that no answer is given from work which the CPU's experts did not finish.

    Such a batch raises ExpertsError, which ends the server. After a good batch experts may move between the device and
    the CPU.
    """
    settings = _settings
    assert settings is not None, "it is hooked where they are made"
    if settings.runtime is not None:
        copied = getattr(result, "copy_done", None)
        if copied is not None:
            copied.synchronize()
        else:
            torch.cuda.current_stream().synchronize()
        process_threads().check_streams()
    answered = original(scheduler, batch, result)
    settings.uses.step()
    return answered


def _require_memory(arguments: Any, config: K26Config, num_host_experts: int) -> None:
    """Raise HostMemoryError, before anything is loaded, if the experts on the CPU do not fit into host memory."""
    layers = config.text.num_hidden_layers - config.text.first_k_dense_replace
    require_host_memory(
        num_host_experts * expert_bytes(config.text) * layers // arguments.nnodes,
        f"{num_host_experts} experts of {layers} layers on the CPU",
        "raise --kt-num-gpu-experts, add memory or another node",
    )


class K26HybridScheme(K26MoEScheme):
    """The scheme of one fused-MoE layer of a hybrid run, with one set of experts on the device and one in host memory.

    Each tensor that SGLang loads is cut for the rank and goes to the set that holds its expert.
    """

    def __init__(self, backend_name: str, settings: HybridSettings) -> None:
        super().__init__(backend_name)
        self.settings = settings
        self.backend: HybridExperts | None = None
        self.is_ready = False
        # The host's parameters are not in SGLang's layer, because SGLang would move them to the device with the layer.
        self.host = torch.nn.Module()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the parameters of both sets: on the device, and in host memory."""
        self.layer_number = layer.layer_id
        self._placement = self.settings.placement(self.layer_number)
        sizes = (hidden_size, intermediate_size_per_partition)
        set_attributes = loader_attributes(extra_weight_attrs)
        self.batches = Batches(layer.top_k, self.settings.num_experts, params_dtype, logger)
        host_ids, device_ids = self.placement.host_ids, self.placement.device_ids
        host = (self.host, len(host_ids), *sizes, self.settings.host_backend, set_attributes)
        self.on_host = LayerExperts(*host, device=torch.device("cpu"))
        self.experts = LayerExperts(layer, len(device_ids), *sizes, self.backend_name, self._spread(set_attributes))

    @property
    def placement(self) -> LayerPlacement:
        """The current placement of the layer's experts, which may have moved since the start."""
        return self._placement if self.backend is None else self.backend.placement

    def _spread(self, set_attributes: Callable[[torch.nn.Parameter], None]) -> Callable[[torch.nn.Parameter], None]:
        """Return a function that makes a parameter of SGLang's layer load the host's experts too.

        SGLang's weight loader of the parameter is called with an expert of the checkpoint. The replaced loader passes
        the tensor on to the parameter of the set that holds the expert, with the expert's index in that set.
        """

        def on_parameter(parameter: Any) -> None:
            set_attributes(parameter)
            load = parameter.weight_loader

            def weight_loader(
                param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
            ) -> None:
                is_on_host, slot = self.placement.places[expert_id]
                if not is_on_host:
                    load(param, loaded_weight, weight_name, shard_id=shard_id, expert_id=slot)
                else:
                    name = weight_name.rpartition(".")[2]
                    on_host: Any = self.host.get_parameter(name)
                    on_host.weight_loader(on_host, loaded_weight, weight_name, shard_id=shard_id, expert_id=slot)

            parameter.weight_loader = weight_loader

        return on_parameter

    def places(self, layer: Any) -> Places:
        """Return the set and the slot of each expert."""
        places = self.placement.places
        sides = [self.experts, self.on_host]
        return Places(sides, lambda expert: [places[expert]], layer.moe_tp_rank, layer.moe_tp_size)

    def open(self) -> bool:
        """Prepare both sets for new weights, and return whether either served."""
        self.is_ready = False
        return any([self.on_host.open(), self.experts.open()])

    def close(self) -> None:
        """Give both sets to their backends, and put the backends together to one layer."""
        if self.is_ready:
            return
        # The host's experts may have been closed already, while later layers were loaded.
        self.on_host.close()
        device = self.experts.device
        on_device = None
        if self.placement.device_ids:
            self.experts.close(self.batches)
            on_device = self.experts.backend()
        host = self.on_host.backend()
        if self.backend is not None:
            # The object stays, because CUDA graphs hold the addresses of its tensors on the device.
            self.backend.use(on_device, host)
        else:
            settings = self.settings
            self.backend = HybridExperts(
                on_device,
                host,
                self.placement,
                device,
                settings.streaming,
                settings.runtime,
                settings.deferral,
                self.layer_number,
            )
            settings.uses.add(self.backend)
            self.number = number_of(self.backend)
        self.is_ready = True

    def compute(
        self, out: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> None:
        """Write the routed sum to `out` by one custom operator, which finds this layer's experts by their number."""
        held_experts(out, hidden_states, topk_weights, topk_ids, None, self.number)
