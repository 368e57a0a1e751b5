"""The text decoder in plain PyTorch: the definition of the model, with which every engine's results are compared.

It computes one sequence, without a batch dimension, on the CPU. In the shapes, `T` is the number of tokens, `H` the
hidden size, `N` the number of attention heads, `C` kv_lora_rank and `R` qk_rope_head_dim. Activations have the dtype
that `TextModel` was given, bfloat16 by default. Weights are views of the mapped checkpoint. Each routed expert is read
when a token chooses it, so that the published 594 GB can be computed with little memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from k26_plugins.common.checkpoint.table import LANGUAGE_MODEL, expert_name
from k26_plugins.common.experts import Expert, reference_experts
from k26_plugins.common.model.config import TextConfig
from k26_plugins.common.model.linear import linear
from k26_plugins.common.model.rope import apply_rope, yarn_inv_freq
from k26_plugins.common.model.router import route, router_logits

Weights = Callable[[str], torch.Tensor]
"""Returns the checkpoint's tensor for its full name."""


@dataclass(slots=True)
class KVCache:
    """The KV cache: for each token the compressed latent after its norm, and the shared key after its rotation."""

    config: TextConfig
    max_tokens: int
    dtype: torch.dtype = torch.bfloat16
    length: int = 0
    layers: range | None = None
    """The decoder layers that the cache serves, by default all.

    A run that computes one layer after the other serves only some.
    """
    latent: torch.Tensor = field(init=False)
    """`[layers, max_tokens, C]` in `dtype`."""
    k_rope: torch.Tensor = field(init=False)
    """`[layers, max_tokens, R]` in `dtype`."""

    def __post_init__(self) -> None:
        if self.layers is None:
            self.layers = range(self.config.num_hidden_layers)
        shape = (len(self.layers), self.max_tokens)
        self.latent = torch.zeros(*shape, self.config.kv_lora_rank, dtype=self.dtype)
        self.k_rope = torch.zeros(*shape, self.config.qk_rope_head_dim, dtype=self.dtype)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents `[max_tokens, C]` and the keys `[max_tokens, R]` of a decoder layer, views in `dtype`."""
        assert self.layers is not None, "set when it is made"
        index = self.layers.index(layer)
        return self.latent[index], self.k_rope[index]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Apply root-mean-square norm over the last dimension in float32, then the weight in the dtype of `x`.

    x: `[..., D]`, of a floating dtype; a float64 `x` is normalized in float64. weight: `[D]`, in the dtype of `x`, in
    which the result, of the shape of `x`, is too.
    """
    compute = x.double() if x.dtype == torch.float64 else x.float()
    normed = compute * torch.rsqrt(compute.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


class Attention:
    """Multi-head latent attention (docs/model.md, 3.1)."""

    def __init__(self, config: TextConfig, weights: Weights, layer: int, low_rank_norm_eps: float) -> None:
        self.config, self.layer = config, layer
        self.low_rank_norm_eps = low_rank_norm_eps
        self.inv_freq = yarn_inv_freq(config)
        scaling = config.rope_scaling
        self.rope_magnitude = scaling.magnitude(scaling.mscale) / scaling.magnitude(scaling.mscale_all_dim)
        prefix = f"{LANGUAGE_MODEL}model.layers.{layer}.self_attn"
        self.q_a_proj = weights(f"{prefix}.q_a_proj.weight")
        self.q_a_layernorm = weights(f"{prefix}.q_a_layernorm.weight")
        self.q_b_proj = weights(f"{prefix}.q_b_proj.weight")
        self.kv_a_proj = weights(f"{prefix}.kv_a_proj_with_mqa.weight")
        self.kv_a_layernorm = weights(f"{prefix}.kv_a_layernorm.weight")
        self.kv_b_proj = weights(f"{prefix}.kv_b_proj.weight")
        self.o_proj = weights(f"{prefix}.o_proj.weight")

    def forward(self, x: torch.Tensor, cache: KVCache, *, absorbed: bool) -> torch.Tensor:
        """Return attention's output `[T, H]` for x `[T, H]`, in the dtype of `x`, and append the tokens to the cache.

        The tokens attend to the cached ones and causally to each other. absorbed: whether queries are projected into
        the latent's space, instead of latents into keys and values.
        """
        config, start, end = self.config, cache.length, cache.length + len(x)
        positions = torch.arange(start, end)
        q = linear(rms_norm(linear(x, self.q_a_proj), self.q_a_layernorm, self.low_rank_norm_eps), self.q_b_proj)
        q_nope, q_rope = q.unflatten(-1, (config.num_attention_heads, -1)).split(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1
        )
        q_rope = apply_rope(q_rope, positions, self.inv_freq, self.rope_magnitude)
        latent, k_rope = linear(x, self.kv_a_proj).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latents, k_ropes = cache.of_layer(self.layer)
        latents[start:end] = rms_norm(latent, self.kv_a_layernorm, self.low_rank_norm_eps)
        k_ropes[start:end] = apply_rope(k_rope, positions, self.inv_freq, self.rope_magnitude)
        attend = self._absorbed if absorbed else self._plain
        out = attend(q_nope, q_rope, latents[:end], k_ropes[:end])
        return linear(out.flatten(-2), self.o_proj)

    def _plain(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor
    ) -> torch.Tensor:
        """Project the latents to keys and values of every head, and return `[T, N, v_head_dim]`."""
        config = self.config
        heads = linear(latent, self.kv_b_proj).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, value = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        shared = k_rope.unsqueeze(1).expand(-1, config.num_attention_heads, -1)
        query, key = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, shared), -1)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            attn_mask=self._mask(len(query), len(key)),
            scale=config.softmax_scale,
        )
        return out.transpose(0, 1)

    def _absorbed(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor
    ) -> torch.Tensor:
        """Project the queries into the latent's space, where the latent is both key and value.

        Return `[T, N, v_head_dim]`.
        """
        config = self.config
        unfold = self.kv_b_proj.unflatten(0, (config.num_attention_heads, -1))
        w_uk, w_uv = unfold.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        query = torch.cat((torch.einsum("tnd,ndc->tnc", q_nope, w_uk), q_rope), -1).transpose(0, 1)
        key = torch.cat((latent, k_rope), -1).unsqueeze(0)
        out = F.scaled_dot_product_attention(
            query,
            key.expand(len(query), -1, -1),
            latent.unsqueeze(0).expand(len(query), -1, -1),
            attn_mask=self._mask(query.shape[1], len(latent)),
            scale=config.softmax_scale,
        )
        return torch.einsum("ntc,nvc->tnv", out, w_uv)

    @staticmethod
    def _mask(num_queries: int, num_keys: int) -> torch.Tensor:
        """Return bool `[num_queries, num_keys]`, True where a query may see a key; the last query sees every key."""
        return torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)


class SwiGLU:
    """The feed-forward down(silu(gate · x) · (up · x)) of the dense layers and of the shared expert."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.gate_proj = weights(f"{prefix}.gate_proj.weight")
        self.up_proj = weights(f"{prefix}.up_proj.weight")
        self.down_proj = weights(f"{prefix}.down_proj.weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x `[T, H]`, in the shape and dtype of `x`."""
        return linear(F.silu(linear(x, self.gate_proj)) * linear(x, self.up_proj), self.down_proj)


class MoE:
    """The feed-forward of an MoE layer: the weighted sum of routed experts, plus the shared expert without a weight."""

    def __init__(self, config: TextConfig, weights: Weights, layer: int) -> None:
        self.config, self.layer, self.weights = config, layer, weights
        prefix = f"{LANGUAGE_MODEL}model.layers.{layer}.mlp"
        self.gate = weights(f"{prefix}.gate.weight")
        self.e_score_correction_bias = weights(f"{prefix}.gate.e_score_correction_bias")
        self.shared_experts = SwiGLU(weights, f"{prefix}.shared_experts")

    def expert(self, index: int) -> Expert:
        """Read one routed expert."""
        parts = {
            (projection, part): self.weights(expert_name(self.layer, index, projection, part))
            for projection in ("gate", "up", "down")
            for part in ("packed", "scale")
        }
        return Expert(
            torch.cat((parts["gate", "packed"], parts["up", "packed"])),
            torch.cat((parts["gate", "scale"], parts["up", "scale"])),
            parts["down", "packed"],
            parts["down", "scale"],
        )

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights (float32) and ids (int64) of the experts for x `[T, H]`, of any floating dtype.

        Both have the shape `[T, top_k]`.
        """
        config = self.config
        return route(
            router_logits(x, self.gate),
            self.e_score_correction_bias,
            config.num_experts_per_tok,
            config.routed_scaling_factor,
            normalize=config.norm_topk_prob,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output for x `[T, H]`, in the shape and dtype of `x`."""
        topk_weights, topk_ids = self.choose(x)
        routed = reference_experts(x, topk_ids, topk_weights, self.expert, self.config.n_routed_experts)
        return routed.to(x.dtype) + self.shared_experts.forward(x)


class Block:
    """A decoder layer, pre-norm."""

    def __init__(self, config: TextConfig, weights: Weights, layer: int, low_rank_norm_eps: float) -> None:
        prefix = f"{LANGUAGE_MODEL}model.layers.{layer}"
        self.eps = config.rms_norm_eps
        self.input_layernorm = weights(f"{prefix}.input_layernorm.weight")
        self.self_attn = Attention(config, weights, layer, low_rank_norm_eps)
        self.post_attention_layernorm = weights(f"{prefix}.post_attention_layernorm.weight")
        self.mlp = MoE(config, weights, layer) if config.is_moe_layer(layer) else SwiGLU(weights, f"{prefix}.mlp")

    def forward(self, x: torch.Tensor, cache: KVCache, *, absorbed: bool) -> torch.Tensor:
        """Return the output for x `[T, H]`, in the shape and dtype of `x`, and append the tokens to `cache`.

        absorbed: the form of attention, see `Attention.forward`.
        """
        x = x + self.self_attn.forward(rms_norm(x, self.input_layernorm, self.eps), cache, absorbed=absorbed)
        return x + self.mlp.forward(rms_norm(x, self.post_attention_layernorm, self.eps))


class TextModel:
    """The text decoder: embedding, decoder layers, final norm and head.

    dtype: dtype of the activations. Weights in bfloat16, except INT4 scales, are converted to it when the model is
    built, which copies nothing if it is bfloat16 too. low_rank_norm_eps: epsilon of the two norms inside attention; the
    engines use rms_norm_eps, which is the default, and transformers 1e-6.
    """

    def __init__(
        self,
        config: TextConfig,
        weights: Weights,
        dtype: torch.dtype = torch.bfloat16,
        low_rank_norm_eps: float | None = None,
    ) -> None:
        def cast(name: str) -> torch.Tensor:
            tensor = weights(name)
            # The scales keep the dtype of the INT4 format, and the router's bias stays in float32.
            return tensor.to(dtype) if tensor.dtype == torch.bfloat16 and "weight_scale" not in name else tensor

        self.config, self.dtype = config, dtype
        eps = config.rms_norm_eps if low_rank_norm_eps is None else low_rank_norm_eps
        self.embed_tokens = weights(f"{LANGUAGE_MODEL}model.embed_tokens.weight")
        self.layers = [Block(config, cast, layer, eps) for layer in range(config.num_hidden_layers)]
        self.norm = cast(f"{LANGUAGE_MODEL}model.norm.weight")
        self.lm_head = cast(f"{LANGUAGE_MODEL}lm_head.weight")

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings `[T, H]`, in the model's dtype, for int64 token ids `[T]`."""
        return F.embedding(input_ids, self.embed_tokens).to(self.dtype)

    def forward(self, x: torch.Tensor, cache: KVCache, *, absorbed: bool | None = None) -> torch.Tensor:
        """Return the final hidden states `[T, H]` for embeddings `[T, H]` that follow the cached tokens.

        Both are in the model's dtype. absorbed: the form of attention; by default the plain form on an empty cache and
        the absorbed form otherwise. Raises ValueError if the cache is too small.
        """
        if cache.length + len(x) > cache.max_tokens:
            raise ValueError(f"{cache.length} + {len(x)} tokens do not fit in a cache of {cache.max_tokens}.")
        form = cache.length > 0 if absorbed is None else absorbed
        for block in self.layers:
            x = block.forward(x, cache, absorbed=form)
        cache.length += len(x)
        return rms_norm(x, self.norm, self.config.rms_norm_eps)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return logits `[T, vocab_size]` in float32 (float64 for float64 input) for final hidden states `[T, H]`."""
        logits = linear(hidden_states, self.lm_head)
        return logits if logits.dtype == torch.float64 else logits.float()
