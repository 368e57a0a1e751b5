"""What memory bandwidth allows at most while decoding. A bound, from published bandwidths: no engine reaches it."""

from __future__ import annotations

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.fit import Fit
from k26_plugins.operate.plan.weights import ROUTED, absorbed_bytes, stages


def experts_touched(config: K26Config, tokens: int) -> float:
    """Distinct experts of a layer that `tokens` tokens choose, if each chooses at random."""
    text = config.text
    return text.n_routed_experts * (1 - (1 - text.num_experts_per_tok / text.n_routed_experts) ** tokens)


def plain_bytes(config: K26Config, fit: Fit) -> float:
    """Bytes of weights, routed experts aside, that a GPU reads in every step.

    The vision tower is idle, a token's row of the embedding is nothing, and of two copies of kv_b_proj one is read.
    """
    embedding = fit.weights["embedding and head"] / 2 if fit.layout.pp == 1 else 0.0
    plain = sum(size for part, size in fit.weights.items() if part not in (ROUTED, "vision")) - embedding
    if fit.layout.absorbed_copy:
        layers = len(stages(config.text.num_hidden_layers, fit.layout.pp)[0])
        plain -= absorbed_bytes(config.text, layers, fit.layout.tp)
    return plain


def decode_bound(
    config: K26Config, fit: Fit, sequences: int, context: int, *, gpu_experts: float = 1.0
) -> float | None:
    """Tokens a second that all `sequences` together get at most, each `context` tokens long; None without a bandwidth.

    Every byte of weights that a step needs and every byte of its KV cache is read once from each GPU's memory; pipeline
    stages follow one another. gpu_experts: the share of routed experts that is in GPU memory.
    """
    if fit.gpu.bandwidth is None:
        return None
    touched = experts_touched(config, sequences) / config.text.n_routed_experts
    read = (
        plain_bytes(config, fit) + fit.weights[ROUTED] * touched * gpu_experts + sequences * context * fit.kv_per_token
    )
    return sequences * fit.gpu.bandwidth / (read * fit.layout.pp)
