"""Work out how much memory a golden run takes, before it starts, and keep its stages within that.

The constants are the sizes of the blocks in which the stages work.
"""

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
"""Bytes that attention scores may take at once, and likewise logits; both are computed in blocks that keep to it."""
HEAD_ROWS = 4096
"""Largest number of rows of lm_head in a block."""
READ_AHEAD = 2
"""Number of experts that are read while another is computed."""
NEAR = 4
"""Number of experts kept for each token beside the chosen ones: those with the next best scores, which a wrong bias of
the router would choose."""
FEED_TOKENS = 1024
"""Number of tokens that go through a dense feed-forward or a shared expert at a time."""
EXPERT_TOKENS = 256
"""Largest number of tokens that go through an expert at a time; enough that unpacking the expert's weights takes little
time beside the products."""
MAX_THREADS = 8
"""Largest number of threads that compute experts at the same time, each with memory of its own."""
SMALL_HIDDEN_SIZE = 1024
"""Largest hidden size for which an operator is done before a second thread has started."""
M_MMAP_THRESHOLD = -3  # malloc.h
# Dequantizing allocates thousands of smaller blocks; to map each of those by itself would cost more than the work.
MAPPED_FROM = 2**20
# An allowance for what PyTorch's threads and the allocator take.
SLACK = 128 * 2**20
BFLOAT16, FLOAT32 = 2, 4


@dataclass(frozen=True, slots=True)
class Carried:
    """The sizes of a run's prompts, from which its memory is worked out."""

    tokens: int
    """Number of prompt tokens that the model computes; the bf16 baseline computes as many."""
    suspect_tokens: int
    """Number of prompt tokens that all suspects together compute, in float32."""
    longest: int
    """Number of tokens of the longest prompt."""
    patches: int
    """Number of image patches of the prompt that has the most."""

    @property
    def all_tokens(self) -> int:
        """Number of tokens over all carried models: the model, the bf16 baseline and the suspects."""
        return 2 * self.tokens + self.suspect_tokens


def give_back_freed_memory() -> None:
    """Make glibc allocate each block above 1 MiB by mmap, so that the memory of a freed tensor goes back to the system.

    By default blocks of up to 32 MB may come from malloc's arenas, which keep the memory of freed blocks, so that the
    process would exceed the peak that was announced.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)


def compute_threads() -> int:
    """Return the number of threads that compute experts at the same time."""
    return min(torch.get_num_threads(), MAX_THREADS)


@contextmanager
def threads_for(config: TextConfig) -> Iterator[None]:
    """Use one thread within the context if the model is small, and restore the number of threads afterwards.

    Threads that wait for each other spin. Where other processes need the cores too, a second thread made 8 passes of 20
    prompts over a tiny checkpoint take 180 s instead of 21 s (2 cores of an AMD EPYC Milan, load 6).
    """
    before = torch.get_num_threads()
    if config.hidden_size <= SMALL_HIDDEN_SIZE:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def query_chunk(config: TextConfig, length: int) -> int:
    """Return how many queries to compute at a time over `length` keys.

    With that many, the scores of all heads, their softmax and the mask stay within SCRATCH.
    """
    return max(1, min(length, SCRATCH // (3 * FLOAT32 * config.num_attention_heads * length)))


def head_rows(tokens: int) -> int:
    """Return how many rows of lm_head to compute at a time for `tokens` positions.

    With that many, the logits and the tensors computed from them stay within SCRATCH, unless that would be fewer than
    128 rows.
    """
    return max(128, min(HEAD_ROWS, SCRATCH // (6 * FLOAT32 * max(tokens, 1))))


def peak(config: K26Config, carried: Carried, top_k: int) -> dict[str, int]:
    """Return the bytes that each stage holds at most, beyond what the process had when the run began.

    The largest of them is the run's peak. top_k: likeliest tokens that are kept at each position.
    """
    text = config.text
    hidden = text.hidden_size
    state = carried.tokens * hidden * (FLOAT32 + BFLOAT16) + carried.suspect_tokens * hidden * FLOAT32
    # Every stage holds the hidden states of all carried models, and computes the new ones beside the old ones.
    base = 2 * state + carried.tokens * text.num_hidden_layers * _choice_bytes(text) + SLACK
    table = tensor_table(config)
    heads = text.num_attention_heads * (2 * text.qk_head_dim + 2 * text.v_head_dim)
    stages = {
        "attention": 3 * _stored(table, "self_attn") + carried.longest * (heads + hidden * 3) * FLOAT32 + SCRATCH,
        "dense feed-forward": 3 * _stored(table, "mlp") + 4 * FEED_TOKENS * text.intermediate_size * FLOAT32,
        # The experts that wait to be computed, are computed or are being read, and the activations of each thread.
        "routed experts": (2 * compute_threads() + 1 + READ_AHEAD) * expert_bytes(text)
        + compute_threads()
        * (2 * TILE_ROWS * hidden + EXPERT_TOKENS * (6 * hidden + 5 * text.moe_intermediate_size))
        * FLOAT32
        # The input after the norm and the sum of routed experts, both in float32, and the choice of experts.
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
    """Return the bytes of the router's choice for one token in one layer.

    They are the experts' ids in 16 bits and their gaps in 32, both held twice.
    """
    return 2 * (text.num_experts_per_tok + NEAR) * (2 + FLOAT32)


def _stored(table: Mapping[str, TensorSpec], part: str) -> int:
    """Return the bytes of the tensors of `part`, routed experts left out, in the layer that has the most of them."""
    layers: Counter[int] = Counter()
    for spec in table.values():
        if spec.layer is not None and spec.expert is None and f".{part}." in spec.name:
            layers[spec.layer] += spec.num_bytes
    return max(layers.values(), default=0)
