"""What a GPU holds beside the weights, and how many tokens of KV cache are left."""

from __future__ import annotations

from dataclasses import dataclass, field

from k26_plugins.common.model.config import K26Config, TextConfig
from k26_plugins.operate.plan.gpus import GIB, Gpu
from k26_plugins.operate.plan.weights import Layout, per_gpu, stages

KV_BYTES = {"bf16": 2, "fp8": 1}
BATCHED_TOKENS = 8192
"""Tokens in one step, both engines' usual size for prefill."""
SEQUENCES = 256
"""Requests in one step, for which the sampler's memory is reserved; the command asks for no more."""
# What engines keep besides, which nobody publishes part by part. Fitted, not computed, to all the published runs in
# docs/hardware.md: CUDA context, communication buffers, CUDA graphs and the allocator's slack; how often the sampler holds
# the logits of all requests while it sorts them; and what each rank of decode-context parallelism adds to the workspace.
OVERHEAD = round(1.5 * GIB)
LOGITS_COPIES = 6.75
CONTEXT_PARALLEL_BYTES = round(0.10 * GIB)
OVERHEAD_SOURCE = "fitted to the published runs in docs/hardware.md, which are met within 4 %; not computed"
# Tokens that an image of the largest size takes (docs/model.md, 4.4).
IMAGE_TOKENS = 4225
BLOCK = 64
"""Tokens of a KV page in MLA backends."""
MEMORY_FRACTION = 0.90


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be served."""

    context: int = 131072
    """Tokens of one request, prompt and answer."""
    concurrency: int = 1
    """Requests of that length at the same time."""
    images: int = 0
    """Images of the largest size in each request, beside `context`."""
    kv_dtype: str = "bf16"
    memory_fraction: float = MEMORY_FRACTION
    """The share of each GPU's memory that the engine may use."""
    sequences: int = SEQUENCES
    """Requests in one step at most."""
    batched_tokens: int = BATCHED_TOKENS
    """Tokens in one step at most."""

    @property
    def tokens(self) -> int:
        """Tokens of KV cache for all of it."""
        return self.concurrency * (self.context + self.images * IMAGE_TOKENS)


@dataclass(slots=True, kw_only=True)
class Fit:
    """One GPU of the tightest pipeline stage."""

    layout: Layout
    gpu: Gpu
    load: Load
    weights: dict[str, int] = field(default_factory=dict)
    activations: int = 0
    overhead: int = 0
    budget: int = 0
    """Bytes that the engine may use."""
    kv_per_token: float = 0.0
    """Bytes on this GPU for one token of context."""
    max_position: int = 0

    @property
    def kv_bytes(self) -> int:
        """What is left for the KV cache; negative where the weights do not fit."""
        return self.budget - sum(self.weights.values()) - self.activations - self.overhead

    @property
    def kv_tokens(self) -> int:
        return max(int(self.kv_bytes / self.kv_per_token) // BLOCK * BLOCK, 0)

    @property
    def largest_context(self) -> int:
        """Tokens of the longest single request that fits."""
        return min(self.kv_tokens, self.max_position)

    @property
    def largest_concurrency(self) -> int:
        """Requests of the load's length at the same time."""
        return self.kv_tokens // (self.load.tokens // self.load.concurrency)

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= self.load.tokens

    @property
    def why(self) -> str:
        """One sentence."""
        weights, budget = sum(self.weights.values()) / GIB, self.budget / GIB
        needed = f"weights take {weights:.1f} GiB of each GPU, of which the engine may use {budget:.1f} GiB"
        if weights > budget:
            return f"{needed}: the weights alone do not fit"
        if self.kv_bytes <= 0:
            rest = (self.activations + self.overhead) / GIB
            return f"{needed}; activations, graphs and buffers want {rest:.1f} GiB, so no KV cache is left"
        answer = f"{needed}; {self.kv_bytes / GIB:.1f} GiB are left for {self.kv_tokens:,} tokens of KV cache"
        return answer if self.fits else f"{answer}, and the load needs {self.load.tokens:,}"


def kv_bytes_per_token(text: TextConfig, kv_dtype: str, num_layers: int | None = None) -> int:
    """Bytes of one token: the latent and the rotated key of each layer, the same on every tensor-parallel rank."""
    layers = text.num_hidden_layers if num_layers is None else num_layers
    return layers * (text.kv_lora_rank + text.qk_rope_head_dim) * KV_BYTES[kv_dtype]


def activation_bytes(config: K26Config, tp: int, load: Load) -> int:
    """What a step of the load's most tokens holds at once, in bfloat16, and the sampler's logits of its most requests."""
    text, vision, tokens = config.text, config.vision, load.batched_tokens
    hidden = 4 * tokens * text.hidden_size * 2
    routed_width = 3 * text.moe_intermediate_size // tp + text.hidden_size
    routed = tokens * text.num_experts_per_tok * routed_width * 2
    heads = text.num_attention_heads // tp
    attention = tokens * heads * (2 * text.qk_head_dim + text.v_head_dim) * 2
    logits = round(LOGITS_COPIES * load.sequences * text.vocab_size * 4)
    # As many image tokens as text tokens, four patches each.
    patches = 4 * tokens * (6 * vision.hidden_size + 2 * vision.intermediate_size) * 2
    return hidden + routed + attention + logits + patches


def fit(config: K26Config, gpu: Gpu, layout: Layout, load: Load) -> Fit:
    """The tightest stage's GPU. Raises LayoutError."""
    return min(fit_stages(config, gpu, layout, load), key=lambda item: item.kv_bytes / item.kv_per_token)


def fit_stages(config: K26Config, gpu: Gpu, layout: Layout, load: Load) -> list[Fit]:
    """A GPU of each pipeline stage. Raises LayoutError."""
    overhead = OVERHEAD + (CONTEXT_PARALLEL_BYTES * layout.context_parallel if layout.context_parallel > 1 else 0)
    found = []
    for stage, layers in enumerate(stages(config.text.num_hidden_layers, layout.pp)):
        found.append(
            Fit(
                layout=layout,
                gpu=gpu,
                load=load,
                weights=per_gpu(config, layout, stage),
                activations=activation_bytes(config, layout.tp, load),
                overhead=overhead,
                budget=int(gpu.memory * load.memory_fraction),
                kv_per_token=kv_bytes_per_token(config.text, load.kv_dtype, len(layers)) / layout.context_parallel,
                max_position=config.text.max_position_embeddings,
            )
        )
    return found
