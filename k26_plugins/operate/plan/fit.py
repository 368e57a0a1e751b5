"""Work out what a GPU holds beside the weights, and how many tokens of KV cache fit in the rest of its memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from k26_plugins.common.model.config import K26Config, TextConfig
from k26_plugins.operate.plan.gpus import GIB, Gpu
from k26_plugins.operate.plan.weights import Layout, per_gpu, stages

KV_BYTES = {"bf16": 2, "fp8": 1}
BATCHED_TOKENS = 8192
"""Largest number of tokens in one step; both engines usually prefill in steps of this size."""
SEQUENCES = 256
"""Largest number of requests in one step, for which the sampler's memory is reserved; vLLM's command allows no more."""
# The three constants below stand for memory of the engines that nobody publishes part by part. They are fitted to all
# the published runs in docs/hardware.md, not computed. OVERHEAD is for the CUDA context, communication buffers, CUDA
# graphs and the allocator's slack; LOGITS_COPIES is how often the sampler holds the logits of all requests while it
# sorts them; CONTEXT_PARALLEL_BYTES is what each rank of decode-context parallelism adds to the workspace.
OVERHEAD = round(1.5 * GIB)
LOGITS_COPIES = 6.75
CONTEXT_PARALLEL_BYTES = round(0.10 * GIB)
OVERHEAD_SOURCE = "fitted to the published runs in docs/hardware.md, which are met within 4 %; not computed"
# The number of tokens of an image of the largest size (docs/model.md, 4.4).
IMAGE_TOKENS = 4225
BLOCK = 64
"""Tokens in a page of the KV cache in MLA backends."""
MEMORY_FRACTION = 0.90


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The requests that a server is planned for, and the limits that it is given."""

    context: int = 131072
    """Tokens of one request, prompt and answer together, without its images."""
    concurrency: int = 1
    """Number of requests of that length at the same time."""
    images: int = 0
    """Number of images of the largest size in each request; their tokens are added to `context`."""
    kv_dtype: str = "bf16"
    """The KV cache's dtype, a key of KV_BYTES."""
    memory_fraction: float = MEMORY_FRACTION
    """The share of each GPU's memory that the engine may use."""
    sequences: int = SEQUENCES
    """Largest number of requests in one step."""
    batched_tokens: int = BATCHED_TOKENS
    """Largest number of tokens in one step."""

    @property
    def tokens(self) -> int:
        """Tokens of KV cache that all requests need together, images included."""
        return self.concurrency * (self.context + self.images * IMAGE_TOKENS)


@dataclass(slots=True, kw_only=True)
class Fit:
    """The memory of one GPU of a pipeline stage; where a plan has one Fit, it is that of the tightest stage."""

    layout: Layout
    gpu: Gpu
    load: Load
    stage: int = 0
    """Number of the pipeline stage."""
    weights: dict[str, int] = field(default_factory=dict)
    """Bytes by part, one of `weights.PARTS`."""
    activations: int = 0
    """Bytes."""
    overhead: int = 0
    """Bytes of everything else that the engine keeps."""
    budget: int = 0
    """Bytes that the engine may use."""
    kv_per_token: float = 0.0
    """Bytes of KV cache on this GPU for one token of context."""
    max_position: int = 0
    """Tokens of the longest request that the model can take."""

    @property
    def kv_bytes(self) -> int:
        """Bytes that are left for the KV cache; negative if weights, activations and overhead exceed the budget."""
        return self.budget - sum(self.weights.values()) - self.activations - self.overhead

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that fit, a multiple of BLOCK; 0 if none do."""
        return max(int(self.kv_bytes / self.kv_per_token) // BLOCK * BLOCK, 0)

    @property
    def largest_context(self) -> int:
        """Tokens of the longest single request that fits."""
        return min(self.kv_tokens, self.max_position)

    @property
    def largest_concurrency(self) -> int:
        """Number of requests of the load's length that fit at the same time."""
        return self.kv_tokens // (self.load.tokens // self.load.concurrency)

    @property
    def fits(self) -> bool:
        """Whether the KV cache of the whole load fits."""
        return self.kv_tokens >= self.load.tokens

    @property
    def why(self) -> str:
        """One sentence that says why the load fits, or why it does not."""
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
    """Return the bytes of one token's KV cache, which is the latent and the rotated key of each layer.

    Every tensor-parallel rank holds the same. kv_dtype: a key of KV_BYTES. num_layers: all layers by default.
    """
    layers = text.num_hidden_layers if num_layers is None else num_layers
    return layers * (text.kv_lora_rank + text.qk_rope_head_dim) * KV_BYTES[kv_dtype]


def activation_bytes(config: K26Config, tp: int, load: Load) -> int:
    """Return the bytes that the largest step of the load holds at once on one of `tp` ranks.

    They are the bfloat16 activations of `batched_tokens` tokens and the sampler's float32 logits of `sequences`
    requests.
    """
    text, vision, tokens = config.text, config.vision, load.batched_tokens
    hidden = 4 * tokens * text.hidden_size * 2
    routed_width = 3 * text.moe_intermediate_size // tp + text.hidden_size
    routed = tokens * text.num_experts_per_tok * routed_width * 2
    heads = text.num_attention_heads // tp
    attention = tokens * heads * (2 * text.qk_head_dim + text.v_head_dim) * 2
    logits = round(LOGITS_COPIES * load.sequences * text.vocab_size * 4)
    # A step may have as many image tokens as text tokens; each image token is four patches in the vision tower.
    patches = 4 * tokens * (6 * vision.hidden_size + 2 * vision.intermediate_size) * 2
    return hidden + routed + attention + logits + patches


def fit(config: K26Config, gpu: Gpu, layout: Layout, load: Load) -> Fit:
    """Return a GPU of the tightest stage, the one whose KV cache holds the fewest tokens.

    Raises LayoutError if the model cannot be cut as `layout` says.
    """
    return min(fit_stages(config, gpu, layout, load), key=lambda item: item.kv_bytes / item.kv_per_token)


def fit_stages(config: K26Config, gpu: Gpu, layout: Layout, load: Load) -> list[Fit]:
    """Return one GPU of each pipeline stage. Raises LayoutError if the model cannot be cut as `layout` says."""
    overhead = OVERHEAD + (CONTEXT_PARALLEL_BYTES * layout.context_parallel if layout.context_parallel > 1 else 0)
    found = []
    for stage, layers in enumerate(stages(config.text.num_hidden_layers, layout.pp)):
        found.append(
            Fit(
                layout=layout,
                gpu=gpu,
                load=load,
                stage=stage,
                weights=per_gpu(config, layout, stage),
                activations=activation_bytes(config, layout.tp, load),
                overhead=overhead,
                budget=int(gpu.memory * load.memory_fraction),
                kv_per_token=kv_bytes_per_token(config.text, load.kv_dtype, len(layers)) / layout.context_parallel,
                max_position=config.text.max_position_embeddings,
            )
        )
    return found
