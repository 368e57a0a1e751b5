"""The whole reference model: text decoder and vision tower, loaded from one checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.decoder import KVCache, TextModel
from k26_plugins.common.reference.moonvit import MoonViT


class KimiK26:
    """Kimi-K2.6 in plain PyTorch, slow but small and readable; engines' answers are compared with it.

    Examples:
        `tiny_folder` is a checkpoint's folder, here one that `make_tiny` wrote.

        >>> model = KimiK26(Checkpoint(tiny_folder))
        >>> prompt = torch.tensor([72, 105, 33])
        >>> logprobs = model.logprobs(prompt)
        >>> logprobs.shape, logprobs.dtype
        (torch.Size([3, 512]), torch.float32)
        >>> next(model.generate(prompt)) == int(logprobs[-1].argmax())
        True
    """

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype = torch.bfloat16, low_rank_norm_eps: float | None = None
    ) -> None:
        self.config = checkpoint.config
        self.text = TextModel(self.config.text, checkpoint.tensor, dtype, low_rank_norm_eps)
        with torch.device("meta"):
            self.vision = MoonViT(self.config.vision)
        weights = {name: checkpoint.tensor(name).to(dtype) for name in self.vision.state_dict()}
        self.vision.load_state_dict(weights, assign=True)
        self.vision.requires_grad_(False)

    @torch.inference_mode()
    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the embeddings `[T, hidden_size]` of int64 token ids `[T]` and media, in the model's dtype.

        The embeddings of media take the place of the placeholder tokens. pixel_values, grid_thw: as for
        `MoonViT.forward`. Raises ValueError if the media do not have as many tokens as there are placeholders.
        """
        placeholder = input_ids == self.config.media_placeholder_token_id
        # As in transformers and the engines, the placeholder's own row in the embedding is not looked up.
        embeddings = self.text.embed(input_ids.masked_fill(placeholder, 0))
        if pixel_values is None or grid_thw is None:
            media = embeddings[:0]
        else:
            media = torch.cat(self.vision(pixel_values, grid_thw)).to(embeddings.dtype)
        if len(media) != int(placeholder.sum()):
            raise ValueError(
                f"the media have {len(media)} tokens and the prompt has {int(placeholder.sum())} placeholders: "
                f"expand each placeholder to its medium's number of tokens."
            )
        embeddings[placeholder] = media
        return embeddings

    @torch.inference_mode()
    def logprobs(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return float32 `[T, vocab_size]`; row t has the log-probabilities of the token after `input_ids[t]`.

        Arguments are those of `embed`.
        """
        cache = KVCache(self.config.text, len(input_ids), self.text.dtype)
        hidden_states = self.text.forward(self.embed(input_ids, pixel_values, grid_thw), cache)
        return self.text.logits(hidden_states).float().log_softmax(-1)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield token ids until the stop token, which is not yielded, or until `max_new_tokens`.

        input_ids: int64 `[T]`. pixel_values, grid_thw: as for `embed`. With temperature 0, the likeliest token is
        taken. Otherwise, tokens are drawn from the smallest set of the likeliest tokens whose probability together is
        at least `top_p`.
        """
        generator = torch.Generator().manual_seed(seed)
        cache = KVCache(self.config.text, len(input_ids) + max_new_tokens, self.text.dtype)
        embeddings = self.embed(input_ids, pixel_values, grid_thw)
        for _ in range(max_new_tokens):
            logits = self.text.logits(self.text.forward(embeddings, cache)[-1:])[0]
            token = _choose(logits, temperature, top_p, generator)
            if token == self.config.eos_token_id:
                return
            yield token
            embeddings = self.text.embed(torch.tensor([token]))


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    # A token is kept if the probabilities before it sum to less than top_p, so the first is always kept.
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
