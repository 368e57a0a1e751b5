"""Compute the distributions that a golden file keeps from the final hidden states.

lm_head is read in blocks of rows, so that the logits over the whole vocabulary are never held at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k26_plugins.common.checkpoint import StreamedCheckpoint
from k26_plugins.common.model.linear import linear
from k26_plugins.operate.golden.memory import head_rows

LM_HEAD = "language_model.lm_head.weight"


@dataclass(slots=True)
class Other:
    """The final hidden states of the bf16 baseline or of a suspect, at some of the model's positions."""

    hidden: torch.Tensor
    """`[n, hidden_size]` in the other model's dtype, after the final norm."""
    rows: torch.Tensor
    """int64 `[n]`: the model's position that each row belongs to."""


@dataclass(slots=True)
class Answers:
    """The kept part of the distributions over the vocabulary at `N` positions."""

    top_ids: torch.Tensor
    """int64 `[N, K]`: the model's likeliest tokens, the likeliest first."""
    top_logprobs: torch.Tensor
    """float32 `[N, K]`: the log-probabilities of `top_ids`."""
    target_logprobs: torch.Tensor
    """float32 `[N]`: the log-probability of the token that follows each position; NaN where that token is not known."""
    others: list[torch.Tensor]
    """For each other model, float32 `[n, K]`: its log-probabilities of the model's `top_ids` at its `rows`."""
    kl: list[torch.Tensor]
    """For each other model, float32 `[n]`: its KL divergence from the model, Σ p · (log p − log q) over the whole
    vocabulary, where p is the model's distribution and q the other model's."""


class _Sum:
    """A running log Σ exp over blocks of logits, kept as the largest logit so far and a sum relative to it."""

    def __init__(self, count: int) -> None:
        self.largest = torch.full((count,), -torch.inf, dtype=torch.float64)
        self.total = torch.zeros(count, dtype=torch.float64)

    def add(self, logits: torch.Tensor) -> torch.Tensor:
        """Add a block of logits, `[count, rows]`.

        Returns the factor `[count]` by which sums relative to the earlier largest logit must be multiplied, since the
        block may have a larger one.
        """
        largest = torch.maximum(self.largest, logits.amax(-1).double())
        shrink = (self.largest - largest).exp()
        self.total = self.total * shrink + (logits - largest.float().unsqueeze(-1)).exp().sum(-1, dtype=torch.float64)
        self.largest = largest
        return shrink

    @property
    def value(self) -> torch.Tensor:
        return self.largest + self.total.log()


def answers(
    checkpoint: StreamedCheckpoint, hidden: torch.Tensor, targets: torch.Tensor, others: list[Other], top_k: int
) -> Answers:
    """Return the log-probabilities of the model's `top_k` likeliest tokens at each position, in the other models too.

    hidden: the model's final hidden states after the final norm, float32 `[N, hidden_size]`. targets: int64 `[N]`, the
    token that follows each position, −1 where that token is not known.
    """
    count, vocabulary = len(hidden), checkpoint.config.text.vocab_size
    top_k = min(top_k, vocabulary)
    best = torch.empty(count, 0)
    best_ids = torch.empty(count, 0, dtype=torch.int64)
    best_others = [torch.empty(len(other.rows), 0) for other in others]
    target = torch.full((count,), torch.nan)
    own, sums = _Sum(count), [_Sum(len(other.rows)) for other in others]
    differences = [torch.zeros(len(other.rows), dtype=torch.float64) for other in others]
    step = head_rows(count)
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        head = checkpoint.rows(LM_HEAD, start, stop)
        logits = linear(hidden, head.float())
        shrink = own.add(logits)
        here = (targets >= start) & (targets < stop)
        target[here] = logits[here].gather(1, targets[here, None] - start)[:, 0]
        # Merge the likeliest tokens of this block with the likeliest of all earlier blocks.
        values, ids = logits.topk(min(top_k, stop - start), dim=-1)
        merged, order = torch.cat((best, values), -1).topk(min(top_k, best.shape[1] + values.shape[1]), dim=-1)
        for index, other in enumerate(others):
            # The product is computed in the other model's dtype, so its logits are rounded as that model's head rounds
            # them.
            theirs = linear(other.hidden, head.to(other.hidden.dtype)).float()
            sums[index].add(theirs)
            mine = logits[other.rows]
            weight = (mine - own.largest[other.rows].float().unsqueeze(-1)).exp()
            new = (weight * (mine - theirs)).sum(-1, dtype=torch.float64)
            differences[index] = differences[index] * shrink[other.rows] + new
            candidates = torch.cat((best_others[index], theirs.gather(1, ids[other.rows])), -1)
            best_others[index] = candidates.gather(1, order[other.rows])
        best, best_ids = merged, torch.cat((best_ids, ids + start), -1).gather(1, order)
    total = own.value
    kl = [
        difference / own.total[other.rows] - total[other.rows] + theirs.value
        for difference, other, theirs in zip(differences, others, sums, strict=True)
    ]
    return Answers(
        top_ids=best_ids,
        top_logprobs=(best.double() - total.unsqueeze(-1)).float(),
        target_logprobs=(target.double() - total).float(),
        others=[
            (found.double() - theirs.value.unsqueeze(-1)).float()
            for found, theirs in zip(best_others, sums, strict=True)
        ],
        kl=[value.clamp(min=0).float() for value in kl],
    )
