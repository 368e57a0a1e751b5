"""Divide the experts of KTransformers' hybrid run between the GPUs and system memory.

Attention, shared experts and as many routed experts as fit are on the GPUs; the other routed experts are in system
memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from k26_plugins.common.checkpoint import expert_bytes
from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.fit import Fit
from k26_plugins.operate.plan.gpus import GIB
from k26_plugins.operate.plan.weights import ROUTED

# System memory that the operating system and the engine's processes take beside the experts. This is a guess: nobody
# measured it.
RAM_BESIDE_EXPERTS = 30e9


@dataclass(frozen=True, slots=True)
class Hybrid:
    """How the experts of a hybrid run are divided between the GPUs and system memory."""

    gpu_experts: int
    """Number of routed experts of every layer that the GPUs hold."""
    num_experts: int
    """Number of routed experts of a layer."""
    ram_needed: int
    """Bytes of system memory that are needed."""
    ram: int | None
    """Bytes of system memory that there are; None if unknown."""
    gpu_missing: int
    """Bytes that each GPU lacks for the other weights, activations, buffers and the load's KV cache; 0 if these fit."""

    @property
    def fits(self) -> bool:
        """Whether the GPUs and system memory hold the model; False if the size of system memory is not known."""
        return self.gpu_missing == 0 and self.ram is not None and self.ram >= self.ram_needed

    @property
    def why(self) -> str:
        """One sentence that says how the experts are divided, and what is missing."""
        if self.gpu_missing:
            return f"attention, shared experts and KV cache lack {self.gpu_missing / GIB:.1f} GiB on each GPU"
        placed = (
            f"{self.gpu_experts} of {self.num_experts} experts of each layer on the GPUs, the others in system memory"
        )
        needed = f"{placed}, which must be {self.ram_needed / 1e9:.0f} GB"
        if self.ram is None:
            return f"{needed}: say how much there is with --ram"
        return needed if self.fits else f"{needed} and is {self.ram / 1e9:.0f} GB"


def expert_slot_bytes(config: K26Config) -> int:
    """Return the bytes of one routed expert in each MoE layer: 1.384 GiB for the published model."""
    return expert_bytes(config.text) * (config.text.num_hidden_layers - config.text.first_k_dense_replace)


def hybrid(config: K26Config, fit: Fit, ram: int | None) -> Hybrid:
    """Return how many routed experts the GPUs can hold beside all other weights and the KV cache of the load.

    fit: the plan with all experts on the GPUs. ram: bytes of system memory; None if unknown.
    """
    plain = sum(size for part, size in fit.weights.items() if part != ROUTED)
    free = fit.budget - plain - fit.activations - fit.overhead - int(fit.load.tokens * fit.kv_per_token)
    slot = expert_slot_bytes(config)
    held = min(max(free * fit.layout.tp // slot, 0), config.text.n_routed_experts)
    num_experts = config.text.n_routed_experts
    needed = slot * (num_experts - int(held)) + int(RAM_BESIDE_EXPERTS)
    return Hybrid(int(held), num_experts, needed, ram, max(-free, 0))


def cpu_bound(config: K26Config, plan: Hybrid, ram_bandwidth: float) -> float:
    """Return the tokens per second of one request that system memory allows at most.

    The router is assumed to choose experts evenly. ram_bandwidth: bytes per second. The result is infinite if the GPUs
    hold all experts.
    """
    chosen = expert_slot_bytes(config) * config.text.num_experts_per_tok
    share = 1 - plan.gpu_experts / plan.num_experts
    return ram_bandwidth / (chosen * share) if share else float("inf")
