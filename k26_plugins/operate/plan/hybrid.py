"""KTransformers' hybrid run: attention, shared experts and some routed experts on GPUs, the others in system memory."""

from __future__ import annotations

from dataclasses import dataclass

from k26_plugins.common.checkpoint import expert_bytes
from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.fit import Fit
from k26_plugins.operate.plan.gpus import GIB
from k26_plugins.operate.plan.weights import ROUTED

# What the system and the engine's processes take of its memory besides. A guess: nobody measured it.
RAM_BESIDE_EXPERTS = 30e9


@dataclass(frozen=True, slots=True)
class Hybrid:
    """What fits where."""

    gpu_experts: int
    """Experts of every layer that GPUs hold."""
    num_experts: int
    ram_needed: int
    ram: int | None
    gpu_missing: int
    """Bytes that each GPU lacks for what must be there; 0 where it fits."""

    @property
    def fits(self) -> bool:
        return self.gpu_missing == 0 and self.ram is not None and self.ram >= self.ram_needed

    @property
    def why(self) -> str:
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
    """One expert of every layer: 1.384 GiB for the published model."""
    return expert_bytes(config.text) * (config.text.num_hidden_layers - config.text.first_k_dense_replace)


def hybrid(config: K26Config, fit: Fit, ram: int | None) -> Hybrid:
    """How many experts the GPUs of an all-GPU plan `fit` can hold beside what must be there and its load."""
    plain = sum(size for part, size in fit.weights.items() if part != ROUTED)
    free = fit.budget - plain - fit.activations - fit.overhead - int(fit.load.tokens * fit.kv_per_token)
    slot = expert_slot_bytes(config)
    held = min(max(free * fit.layout.tp // slot, 0), config.text.n_routed_experts)
    num_experts = config.text.n_routed_experts
    needed = slot * (num_experts - int(held)) + int(RAM_BESIDE_EXPERTS)
    return Hybrid(int(held), num_experts, needed, ram, max(-free, 0))


def cpu_bound(config: K26Config, plan: Hybrid, ram_bandwidth: float) -> float:
    """Tokens a second of one request that system memory allows at most, if the router chooses experts evenly."""
    chosen = expert_slot_bytes(config) * config.text.num_experts_per_tok
    share = 1 - plan.gpu_experts / plan.num_experts
    return ram_bandwidth / (chosen * share) if share else float("inf")
