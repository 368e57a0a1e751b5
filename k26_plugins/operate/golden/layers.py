"""Compute one decoder layer over a whole batch of prompts and for every carried model, while the layer is read once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch

from k26_plugins.common.checkpoint import StreamedCheckpoint, expert_name
from k26_plugins.common.experts.base import tokens_by_expert
from k26_plugins.common.model.config import TextConfig
from k26_plugins.common.model.int4 import gemm_tiled
from k26_plugins.common.model.router import router_logits
from k26_plugins.common.reference.decoder import Attention, KVCache, MoE, SwiGLU, Weights, rms_norm
from k26_plugins.operate.golden.memory import EXPERT_TOKENS, FEED_TOKENS, NEAR, READ_AHEAD, compute_threads, query_chunk
from k26_plugins.operate.golden.variants import Variant

PROJECTIONS = ("gate", "up", "down")
Expert = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Packed weights and scales by projection."""


@dataclass(slots=True)
class Stream:
    """The hidden states of one carried model."""

    variant: Variant
    config: TextConfig
    """The model's configuration with the variant's change."""
    prompts: list[int]
    """The numbers of the prompts that the model answers."""
    lengths: list[int]
    """The number of tokens of each of these prompts in this pass."""
    hidden: torch.Tensor
    """`[Σ lengths, hidden_size]` in the variant's dtype."""


class Routing(NamedTuple):
    """The input of the routed experts for one stream."""

    x: torch.Tensor
    """`[T, hidden_size]`, after the norm."""
    topk_weights: torch.Tensor
    """`[T, num_experts_per_tok]`."""
    topk_ids: torch.Tensor
    """`[T, num_experts_per_tok]`."""


class Choice(NamedTuple):
    """The router's choice for the model's tokens: the `K` experts that it chose for each and the `N` next best."""

    experts: torch.Tensor
    """int16 `[T, K + N]`: the chosen experts, then the experts with the next best scores, the best first."""
    gaps: torch.Tensor
    """float32 `[T, K + N]`: for a chosen expert, by how much its biased score is above the best score that was not
    chosen; for another expert, by how much its biased score is below the lowest chosen score, as a negative number."""


Keys = dict[tuple[str, int], torch.Tensor]
"""The KV cache of one layer: latent and rotated key of a prompt's tokens, `[tokens, kv_lora_rank + qk_rope_head_dim]`,
by the variant's name and the prompt's number."""


class Layer:
    """A decoder layer whose weights are read part by part: first those of attention, then those of the feed-forward."""

    def __init__(self, checkpoint: StreamedCheckpoint, layer: int) -> None:
        self.checkpoint, self.layer = checkpoint, layer
        self.config = checkpoint.config.text
        self.prefix = f"language_model.model.layers.{layer}"

    def attend(self, streams: list[Stream], earlier: Keys) -> Keys:
        """Add attention to every stream's hidden states and return the keys of this pass's tokens, for later passes.

        earlier: the keys of this layer from all earlier passes. Suspects have no later pass, so their keys are not
        returned.
        """
        kept: Keys = {}
        read: dict[str, torch.Tensor] = {}
        for dtype, group in _by_dtype(streams):
            weights = self._weights(read, dtype)
            norm = weights(f"{self.prefix}.input_layernorm.weight")
            for stream in group:
                attention = Attention(
                    stream.config, _changed(weights, stream.variant), self.layer, self.config.rms_norm_eps
                )
                parts = []
                for prompt, x in zip(stream.prompts, stream.hidden.split(stream.lengths), strict=True):
                    cache = self._cache(earlier.get((stream.variant.name, prompt)), len(x), dtype)
                    chunk = query_chunk(self.config, cache.max_tokens)
                    for piece in x.split(chunk):
                        normed = rms_norm(piece, norm, self.config.rms_norm_eps)
                        # In later passes one new token attends to many earlier ones. The absorbed form is used, because
                        # decompressing the keys of all earlier tokens would be most of the work.
                        parts.append(piece + attention.forward(normed, cache, absorbed=bool(earlier)))
                        cache.length += len(piece)
                    if not stream.variant.is_suspect:
                        kept[stream.variant.name, prompt] = torch.cat(cache.of_layer(self.layer), -1)[-len(x) :]
                stream.hidden = torch.cat(parts)
        return kept

    def _cache(self, before: torch.Tensor | None, num_new: int, dtype: torch.dtype) -> KVCache:
        length = 0 if before is None else len(before)
        cache = KVCache(self.config, length + num_new, dtype, length, range(self.layer, self.layer + 1))
        if before is not None:
            latent, k_rope = before.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
            latents, k_ropes = cache.of_layer(self.layer)
            latents[:length], k_ropes[:length] = latent, k_rope
        return cache

    def feed_forward(self, streams: list[Stream]) -> Choice | None:
        """Add the feed-forward to every stream's hidden states.

        Returns the router's choice for the tokens of the first stream, the model itself; None in a dense layer.
        """
        routing, choice = self._feed_plain(streams)
        if not routing:
            return None
        for stream, routed in zip(streams, self._routed(streams, routing), strict=True):
            stream.hidden = stream.hidden + routed.to(stream.hidden.dtype)
        return choice

    def _feed_plain(self, streams: list[Stream]) -> tuple[dict[str, Routing], Choice | None]:
        """Add the part that every token goes through: the dense feed-forward, or the shared expert of a MoE layer.

        Returns the input of the routed experts by the variant's name, empty in a dense layer, and the router's choice
        for the first stream.
        """
        routing: dict[str, Routing] = {}
        choice: Choice | None = None
        read: dict[str, torch.Tensor] = {}
        for dtype, group in _by_dtype(streams):
            weights = self._weights(read, dtype)
            norm = weights(f"{self.prefix}.post_attention_layernorm.weight")
            for stream in group:
                changed = _changed(weights, stream.variant)
                x = rms_norm(stream.hidden, norm, self.config.rms_norm_eps)
                if self.config.is_moe_layer(self.layer):
                    moe = MoE(stream.config, changed, self.layer)
                    routing[stream.variant.name] = Routing(x, *moe.choose(x))
                    if stream is streams[0]:
                        choice = _choice(moe, routing[stream.variant.name])
                    plain = moe.shared_experts
                else:
                    plain = SwiGLU(changed, f"{self.prefix}.mlp")
                pieces = zip(stream.hidden.split(FEED_TOKENS), x.split(FEED_TOKENS), strict=True)
                stream.hidden = torch.cat([hidden + plain.forward(piece) for hidden, piece in pieces])
        return routing, choice

    def _routed(self, streams: list[Stream], routing: dict[str, Routing]) -> list[torch.Tensor]:
        """Return the weighted sum of the routed experts for each stream, float32 in the shape of its hidden states.

        The sum is that of `reference_experts`, but each expert is read once for all streams.
        """
        outs = [torch.zeros(stream.hidden.shape) for stream in streams]
        pairs = [
            dict(tokens_by_expert(routing[stream.variant.name].topk_ids, None, self.config.n_routed_experts))
            for stream in streams
        ]
        touched = sorted({expert for mine in pairs for expert in mine})

        def pieces_of(expert: int) -> Iterator[_Piece]:
            for stream, out, mine in zip(streams, outs, pairs, strict=True):
                for part in mine[expert].split(EXPERT_TOKENS) if expert in mine else ():
                    yield _Piece(stream.variant, routing[stream.variant.name], part, out)

        # Products run side by side, each on one thread, because a single operator is too short to be split over
        # threads. The products are added in order, so that the sum has the same bits on any number of threads.
        threads = compute_threads()
        waiting: deque[Future[list[_Product]]] = deque()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for expert, parts in self._experts(touched):
                for batch in _batches(pieces_of(expert)):
                    if len(waiting) > threads:
                        _add(waiting.popleft().result())
                    waiting.append(pool.submit(_products, batch, parts))
            for future in waiting:
                _add(future.result())
        # The initializers have set PyTorch's number for threads that start later to 1 as well; set it back.
        torch.set_num_threads(torch.get_num_threads())
        return outs

    def _experts(self, touched: list[int]) -> Iterator[tuple[int, Expert]]:
        """Yield each expert's number, packed weights and scales, and read the next experts in the meantime."""

        def read(expert: int) -> Expert:
            names = {
                (projection, part): expert_name(self.layer, expert, projection, part)
                for projection in PROJECTIONS
                for part in ("packed", "scale")
            }
            found = {name: self.checkpoint.tensor(name) for name in self.checkpoint.in_file_order(names.values())}
            return {
                projection: (found[names[projection, "packed"]], found[names[projection, "scale"]])
                for projection in PROJECTIONS
            }

        with ThreadPoolExecutor(READ_AHEAD) as pool:
            waiting: list[Future[Expert]] = []
            upcoming = iter(touched)
            for expert in touched:
                while len(waiting) < READ_AHEAD and (following := next(upcoming, None)) is not None:
                    waiting.append(pool.submit(read, following))
                yield expert, waiting.pop(0).result()

    def _weights(self, read: dict[str, torch.Tensor], dtype: torch.dtype) -> Weights:
        """Return a function from a name to the tensor of that name, for tensors outside the routed experts.

        bfloat16 tensors are cast to `dtype`; others, such as the router's bias, keep their dtype. Each tensor is read
        from the checkpoint once, into `read`.
        """
        cast: dict[str, torch.Tensor] = {}

        def weights(name: str) -> torch.Tensor:
            if name not in read:
                read[name] = self.checkpoint.tensor(name)
            if name not in cast:
                cast[name] = read[name].to(dtype) if read[name].dtype == torch.bfloat16 else read[name]
            return cast[name]

        return weights


def _choice(moe: MoE, routing: Routing) -> Choice:
    scores = router_logits(routing.x, moe.gate).sigmoid() + moe.e_score_correction_bias
    chosen = scores.gather(-1, routing.topk_ids)
    others = scores.scatter(-1, routing.topk_ids, -torch.inf)
    near, ids = others.topk(min(NEAR, scores.shape[-1] - chosen.shape[-1]), dim=-1)
    gaps = torch.cat((chosen - others.amax(-1, keepdim=True), near - chosen.amin(-1, keepdim=True)), -1)
    return Choice(torch.cat((routing.topk_ids, ids), -1).to(torch.int16), gaps)


class _Piece(NamedTuple):
    """Some tokens of one stream that go to the same expert."""

    variant: Variant
    routing: Routing
    pairs: torch.Tensor
    """The token–expert pairs of these tokens, numbered token · top_k + k."""
    out: torch.Tensor
    """The stream's sum of routed experts, to which the product is added."""


class _Product(NamedTuple):
    """The weighted outputs `y` of an expert, to be added to the rows `rows` of a stream's sum `out`."""

    out: torch.Tensor
    rows: torch.Tensor
    y: torch.Tensor


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yield the pieces in batches of at most EXPERT_TOKENS tokens."""
    batch: list[_Piece] = []
    for piece in pieces:
        if batch and sum(len(other.pairs) for other in batch) + len(piece.pairs) > EXPERT_TOKENS:
            yield batch
            batch = []
        batch.append(piece)
    yield batch


def _products(pieces: list[_Piece], parts: Expert) -> list[_Product]:
    """Return an expert's products for all pieces, from one GEMM, because each pass over the weights is costly."""
    tokens = [piece.pairs // piece.routing.topk_ids.shape[1] for piece in pieces]
    sizes = [len(rows) for rows in tokens]
    x = torch.cat([piece.routing.x[rows].float() for piece, rows in zip(pieces, tokens, strict=True)])
    gate, up = (gemm_tiled(x, *parts[name]).split(sizes) for name in ("gate", "up"))
    inner = torch.cat([piece.variant.activation(*both) for piece, *both in zip(pieces, gate, up, strict=True)])
    products = gemm_tiled(inner, *parts["down"]).split(sizes)
    return [
        _Product(piece.out, rows, y * piece.routing.topk_weights.flatten()[piece.pairs].unsqueeze(-1))
        for piece, rows, y in zip(pieces, tokens, products, strict=True)
    ]


def _add(products: list[_Product]) -> None:
    for out, rows, y in products:
        out.index_add_(0, rows, y)


def _by_dtype(streams: list[Stream]) -> Iterator[tuple[torch.dtype, list[Stream]]]:
    """Yield the streams grouped by dtype, so that weights are cast once and held in one dtype at a time."""
    for dtype in dict.fromkeys(stream.variant.dtype for stream in streams):
        yield dtype, [stream for stream in streams if stream.variant.dtype == dtype]


def _changed(weights: Weights, variant: Variant) -> Weights:
    return lambda name: variant.weight(name, weights(name))
