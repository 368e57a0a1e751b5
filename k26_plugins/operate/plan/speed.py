"""Bound the speed of decoding by memory bandwidth.

The bound follows from published bandwidths, and no engine reaches it.
"""

from __future__ import annotations

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.plan.fit import Fit, fit_stages
from k26_plugins.operate.plan.weights import ROUTED, absorbed_bytes, stages


def experts_touched(config: K26Config, tokens: int) -> float:
    """Return the expected number of a layer's experts that `tokens` tokens choose, if each token chooses at random."""
    text = config.text
    return text.n_routed_experts * (1 - (1 - text.num_experts_per_tok / text.n_routed_experts) ** tokens)


def plain_bytes(config: K26Config, fit: Fit) -> float:
    """Return the bytes of all weights but routed experts that a GPU reads in every step of decoding.

    The vision tower is left out, because it is idle; the embedding, because a token reads one row of it; and one copy of
    kv_b_proj where the engine holds two, because a step reads only one.
    """
    plain = float(sum(size for part, size in fit.weights.items() if part not in (ROUTED, "vision")))
    if fit.stage == 0:
        # The embedding is as large as the head, which is in the last stage.
        plain -= fit.weights["embedding and head"] / (2 if fit.layout.pp == 1 else 1)
    if fit.layout.absorbed_copy:
        layers = len(stages(config.text.num_hidden_layers, fit.layout.pp)[fit.stage])
        plain -= absorbed_bytes(config.text, layers, fit.layout.tp)
    return plain


def decode_bound(
    config: K26Config, fit: Fit, sequences: int, context: int, *, gpu_experts: float = 1.0
) -> float | None:
    """Return the tokens per second that `sequences` requests of `context` tokens get together at most.

    Each step reads every byte of the weights that it needs and of the KV cache once from the GPUs' memory, and its
    pipeline stages run one after the other. Returns None if the GPU's bandwidth is not known. gpu_experts: the share of
    routed experts that is in GPU memory.
    """
    if fit.gpu.bandwidth is None:
        return None
    touched = experts_touched(config, sequences) / config.text.n_routed_experts
    read = sum(
        plain_bytes(config, one) + one.weights[ROUTED] * touched * gpu_experts + sequences * context * one.kv_per_token
        for one in fit_stages(config, fit.gpu, fit.layout, fit.load)
    )
    return sequences * fit.gpu.bandwidth / read
