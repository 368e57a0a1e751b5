"""How much memory a golden run takes, said before it starts: the sizes that its stages hold at once."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from k26_plugins.common.checkpoint import TensorSpec, expert_bytes, tensor_table
from k26_plugins.common.model.config import K26Config, TextConfig
from k26_plugins.common.model.int4 import TILE_ROWS

SCRATCH = 256 * 2**20
"""What attention scores, logits and an expert's activations are cut to, bytes each."""
HEAD_ROWS = 4096
"""Rows of lm_head at a time, at most."""
READ_AHEAD = 2
"""Experts that are read while one is computed."""
NEAR = 4
"""Experts that were almost chosen, kept of each token: what a wrong bias of the router would bring in."""
FEED_TOKENS = 1024
"""Tokens at a time in a dense feed-forward."""
EXPERT_TOKENS = 256
"""Tokens that go through an expert at a time: many enough that unpacking its weights is little beside the products."""
MAX_THREADS = 8
"""The most threads that compute experts at the same time, each with memory of its own."""
SMALL_HIDDEN_SIZE = 1024
"""A model's up to which an operator is done before a second thread has started."""
M_MMAP_THRESHOLD = -3  # malloc.h
# Above the pieces that dequantizing makes by the thousand, for which mapping would cost more than the work.
MAPPED_FROM = 2**20
# What PyTorch's threads and the allocator take besides.
SLACK = 128 * 2**20
BFLOAT16, FLOAT32 = 2, 4


@dataclass(frozen=True, slots=True)
class Carried:
    """Tokens that a run carries, summed over prompts."""

    tokens: int
    """Tokens that the model carries; its bfloat16 twin carries as many."""
    suspect_tokens: int
    """Tokens that all suspects together carry, in float32."""
    longest: int
    """Tokens of the longest prompt."""
    patches: int
    """Patches of the prompt with the most."""

    @property
    def all_tokens(self) -> int:
        return 2 * self.tokens + self.suspect_tokens


def give_back_freed_memory() -> None:
    """Have glibc map each large tensor by itself, so that freeing it frees it.

    By default blocks up to 32 MB end in arenas that keep their holes: a peak said beforehand would not hold.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)


def compute_threads() -> int:
    """Experts that are computed at the same time."""
    return min(torch.get_num_threads(), MAX_THREADS)


@contextmanager
def threads_for(config: TextConfig) -> Iterator[None]:
    """One thread for a small model.

    Threads that wait for each other spin: where others want the cores too, a second one made 8 passes of 20 prompts over a
    tiny checkpoint take 180 s in place of 21 (2 cores of an AMD EPYC Milan, load 6).
    """
    before = torch.get_num_threads()
    if config.hidden_size <= SMALL_HIDDEN_SIZE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def query_chunk(config: TextConfig, length: int) -> int:
    """Queries at a time, so that the scores of all heads, their softmax and the mask stay within SCRATCH."""
    return max(1, min(length, SCRATCH // (3 * FLOAT32 * config.num_attention_heads * length)))


def head_rows(tokens: int) -> int:
    """Rows of lm_head at a time, so that their logits and what is made of them stay within SCRATCH."""
    return max(128, min(HEAD_ROWS, SCRATCH // (6 * FLOAT32 * max(tokens, 1))))


def peak(config: K26Config, carried: Carried, top_k: int) -> dict[str, int]:
    """Bytes that each stage holds at most, beyond what the process had when it began. The largest is the peak."""
    text = config.text
    hidden = text.hidden_size
    state = carried.tokens * hidden * (FLOAT32 + BFLOAT16) + carried.suspect_tokens * hidden * FLOAT32
    # Every stage keeps the state, and makes its next one beside it.
    base = 2 * state + carried.tokens * text.num_hidden_layers * _choice_bytes(text) + SLACK
    table = tensor_table(config)
    heads = text.num_attention_heads * (2 * text.qk_head_dim + 2 * text.v_head_dim)
    stages = {
        "attention": 3 * _stored(table, "self_attn") + carried.longest * (heads + hidden * 3) * FLOAT32 + SCRATCH,
        "dense feed-forward": 3 * _stored(table, "mlp") + 4 * FEED_TOKENS * text.intermediate_size * FLOAT32,
        # Waiting to be computed, computed, and read: with what each thread makes of its tokens.
        "routed experts": (2 * compute_threads() + 1 + READ_AHEAD) * expert_bytes(text)
        + compute_threads()
        * (2 * TILE_ROWS * hidden + EXPERT_TOKENS * (6 * hidden + 5 * text.moe_intermediate_size))
        * FLOAT32
        # Normed input and routed sum in float32, and the choice of experts.
        + carried.all_tokens * (2 * hidden * FLOAT32 + 40 * text.num_experts_per_tok)
        + SCRATCH,
        "answers": head_rows(carried.tokens) * hidden * (FLOAT32 + BFLOAT16)
        + carried.all_tokens * top_k * 6 * FLOAT32
        + SCRATCH,
    }
    if carried.patches:
        vision = config.vision
        stored = sum(spec.num_bytes for spec in table.values() if not spec.name.startswith("language_model"))
        width = 8 * vision.hidden_size + 2 * vision.intermediate_size + 3 * 3 * vision.patch_size**2
        stages["vision tower"] = 3 * stored + carried.patches * width * FLOAT32
    return {stage: base + size for stage, size in stages.items()}


def _choice_bytes(text: TextConfig) -> int:
    """Bytes for one token in one layer: the experts' ids in 16 bits and their gaps in 32, kept twice."""
    return 2 * (text.num_experts_per_tok + NEAR) * (2 + FLOAT32)


def _stored(table: Mapping[str, TensorSpec], part: str) -> int:
    """Bytes of the largest layer's tensors whose names hold `part`, without the routed experts."""
    layers: Counter[int] = Counter()
    for spec in table.values():
        if spec.layer is not None and spec.expert is None and f".{part}." in spec.name:
            layers[spec.layer] += spec.num_bytes
    return max(layers.values(), default=0)
