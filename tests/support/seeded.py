"""Seeds faults into a model in this process and lets `k26 verify` judge it, at the price of one forward per prompt.

The model that stands for an engine is the reference in bfloat16, rounded otherwise than the golden file's bf16
baseline: each number that a linear layer computes gets a normally distributed relative error. Engines on CPUs are
between half and twice as far from the reference as the baseline is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.endpoint import Altered, Fault, yarn_factor

from k26_plugins.common.checkpoint import Checkpoint, StreamedCheckpoint, expert_name
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.reference import decoder as reference
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.operate.golden import Golden, GoldenJob, read_prompts
from k26_plugins.operate.golden.prompts import Prompt
from k26_plugins.operate.verify.endpoint import Answer, Distribution
from k26_plugins.operate.verify.judge import Verdict, judge
from k26_plugins.operate.verify.measure import measure

WORDS = (
    "a an and are because buy by city code def each explain few for from has how if in is it language many model must not "
    "of on or price reason return seven that the then they ticket to train two user was what when which with x y 12 2026"
)
TOP = 20


def make_golden(folder: Path, work: Path, prompts: int, tokens: int, seed: int) -> Golden:
    """Write a golden file of random prompts of raw text, each of about `tokens` tokens, into `work`, and return it."""
    rng = random.Random(seed)
    file = work / f"prompts-{seed}-{prompts}.jsonl"
    with file.open("w") as out:
        for number in range(prompts):
            text = " ".join(rng.choice(WORDS.split()) for _ in range(tokens))[:tokens]
            out.write(json.dumps({"id": f"text {number}", "text": text}) + "\n")
    with StreamedCheckpoint(folder) as checkpoint:
        return GoldenJob(checkpoint, read_prompts(file, folder), work / f"golden-{seed}-{prompts}", 64, 1).run()


class Engine:
    """A model in this process with the interface of the servers that `measure` asks.

    rounding: the standard deviation of the relative error of each number that a linear layer computes.
    """

    engine, url, reports_prompt = "in process", "in process", True
    token_bytes: dict[bytes, int]

    def __init__(self, folder: Path, fault: Fault, rounding: float, seed: int) -> None:
        self.model = KimiK26(Altered(Checkpoint(folder), fault))  # type: ignore[arg-type]
        self.rounding, self.generator = rounding, torch.Generator().manual_seed(seed)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute a linear layer in float32 and give each number of the result a random relative error."""
        y = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return (y * (1 + self.rounding * torch.randn(y.shape, generator=self.generator))).to(x.dtype)

    def prompt(self, prompt: Prompt, top: int) -> dict[int, Distribution]:
        self.last = self._distributions(prompt.token_ids, top)
        return {index: self.last[index] for index in range(len(prompt.token_ids) - 1)}

    def answer(self, prompt: Prompt, max_tokens: int, top: int) -> Answer:
        """Return the first token of the answer; the golden files of `make_golden` have no more."""
        return Answer([max(self.last[-1], key=self.last[-1].__getitem__)], [self.last[-1]])

    def _distributions(self, token_ids: list[int], top: int) -> list[Distribution]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "linear", self.linear)
            values, ids = self.model.logprobs(torch.tensor(token_ids)).topk(top)
        return [dict(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def verdict_of(folder: Path, golden: Golden, fault: Fault, rounding: float = 0.0, seed: int = 0) -> Verdict:
    """Return the verdict of `k26 verify` on the checkpoint's model with the fault."""
    engine: Any = Engine(folder, fault, rounding, seed)
    return judge(golden, measure(engine, golden, top=TOP))


@dataclass(frozen=True)
class Seeded:
    """A fault, the words that the right cause contains, and the rounding of the model that has the fault."""

    name: str
    fault: Fault
    cause: str
    rounding: float
    seed: int


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    return Fault(tensor=lambda found, tensor: change(tensor) if found == name else tensor)


def expert_scaled(layer: int, expert: int, projection: str, factor: float) -> Fault:
    """Return the fault that a projection (`gate`, `up` or `down`) of one expert is multiplied by `factor`."""
    name = expert_name(layer, expert, projection, "scale")
    return _tensor(name, lambda scale: (scale.float() * factor).to(scale.dtype))


def bias_off(layer: int, expert: int, error: float) -> Fault:
    """Return the fault that the router's bias of one expert is off by `error`."""

    def change(bias: torch.Tensor) -> torch.Tensor:
        return bias + error * F.one_hot(torch.tensor(expert), len(bias))

    return _tensor(f"language_model.model.layers.{layer}.mlp.gate.e_score_correction_bias", change)


def theta_off(factor: float) -> Fault:
    """Return the fault that the rotation's theta is multiplied by `factor`."""

    def change(config: K26Config) -> K26Config:
        return replace(config, text=replace(config.text, rope_theta=config.text.rope_theta * factor))

    return Fault(config=change)


def draw(config: K26Config, seed: int, number: int, factors: list[float], errors: list[float]) -> Iterator[Seeded]:
    """Yield `number` random faults, drawn from `seed`.

    Of ten faults four are in an expert, three in a router's bias, one in the rotation, and two in weights that every
    token passes. factors: by which an expert may be multiplied. errors: by which a bias may be off.
    """
    rng, text = random.Random(seed), config.text
    layers = range(text.first_k_dense_replace, text.num_hidden_layers)
    for index in range(number):
        layer, expert = rng.choice(layers), rng.randrange(text.n_routed_experts)
        rounding, kind = rng.choice([0.0, 2**-12, 2**-10]), index % 10
        if kind < 4:
            projection, factor = rng.choice(["gate", "up", "down"]), rng.choice(factors)
            fault = expert_scaled(layer, expert, projection, factor)
            name, cause = (
                f"layer {layer}, expert {expert}: {projection} × {factor}",
                f"expert {expert} of layer {layer}",
            )
        elif kind < 7:
            error = rng.choice(errors) * rng.choice([-1, 1])
            fault, cause = bias_off(layer, expert, error), f"bias of expert {expert} in layer {layer}"
            name = f"layer {layer}, bias of expert {expert} {error:+}"
        elif kind == 7:
            factor = rng.choice([0.98, 1.03])
            yarn = rng.random() < 0.3
            fault = Fault(config=yarn_factor(60.0)) if yarn else theta_off(factor)
            name, cause = "YaRN's factor 60" if yarn else f"theta × {factor}", "positions"
        else:
            part = rng.choice(["self_attn.o_proj", "mlp.shared_experts.down_proj", "self_attn.kv_b_proj"])
            tensor = f"language_model.model.layers.{layer}.{part}.weight"
            fault = _tensor(tensor, lambda weight: weight * 1.1)
            name, cause = f"layer {layer}, {part} × 1.1", "weights of every token's path"
        yield Seeded(name, fault, cause, rounding, rng.randrange(2**31))
