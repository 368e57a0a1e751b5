"""Define the models that a golden run carries through the checkpoint side by side.

They are the right model in float32; the bf16 baseline, the same model in bfloat16, which shows what rounding alone does
to each answer; and a few suspects, each the same model with one mistake that serving code has made or could make. The
checkpoint is read once for all of them. An endpoint that answers as a suspect does, and not as the model does, has the
suspect's mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from k26_plugins.common.model.config import TextConfig

MODEL = "model"
BASELINE = "bfloat16"
# A suspect computes only the first tokens of the first prompts. That is enough to tell suspects apart, and cheap.
SUSPECT_TOKENS = 96
SUSPECT_TEXTS = 4
SUSPECT_IMAGES = 2

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`, elementwise."""
    return F.silu(gate) * up


def _same_config(config: TextConfig) -> TextConfig:
    return config


def _same_weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A carried model, as its differences from the right one."""

    name: str
    meaning: str
    """What is wrong with the model, as reports show it."""
    remedy: str = ""
    """What to check in a server that answers as this model does."""
    dtype: torch.dtype = torch.float32
    config: Callable[[TextConfig], TextConfig] = _same_config
    """Returns this model's configuration for the right model's."""
    weight: Callable[[str, torch.Tensor], torch.Tensor] = _same_weight
    """Returns this model's tensor for the name and value of one of the right model's tensors outside the routed
    experts."""
    activation: Activation = swiglu
    """Returns the input of a routed expert's down projection for the outputs of its gate and up projections, all of
    shape `[tokens, moe_intermediate_size]`."""
    padding: float | None = None
    """The value of padded pixels after normalization; None for the right one."""

    @property
    def is_suspect(self) -> bool:
        """Whether this is a model with a mistake."""
        return self.name not in (MODEL, BASELINE)

    @property
    def on_images_only(self) -> bool:
        """Whether the mistake shows only in prompts with images."""
        return self.padding is not None


def _yarn(factor: Callable[[float], float]) -> Callable[[TextConfig], TextConfig]:
    def change(config: TextConfig) -> TextConfig:
        scaling = config.rope_scaling
        return replace(config, rope_scaling=replace(scaling, factor=factor(scaling.factor)))

    return change


def _without_magnitude(config: TextConfig) -> TextConfig:
    # With both at 0 the cosines and sines keep their size, and only the softmax scale loses YaRN's factor.
    return replace(config, rope_scaling=replace(config.rope_scaling, mscale=0.0, mscale_all_dim=0.0))


def _zero_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if name.endswith("e_score_correction_bias") else tensor


def _swap_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu(up, gate)


def _swap_shards(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Swap the halves of the down projection's inputs, which has the same effect as swapping its columns' halves."""
    return swiglu(gate, up).roll(gate.shape[-1] // 2, -1)


VARIANTS = (
    Variant(name=MODEL, meaning="the model"),
    Variant(name=BASELINE, meaning="the model, rounded as engines round", dtype=torch.bfloat16),
    Variant(
        name="gate-up-swapped",
        meaning="gate and up projection of the routed experts are taken for each other",
        remedy="check the order in which the fused w13 is filled: gate first, then up",
        activation=_swap_gate_up,
    ),
    Variant(
        name="router-bias-dropped",
        meaning="the router chooses experts without e_score_correction_bias",
        remedy="check that the bias is loaded, and in float32",
        weight=_zero_bias,
    ),
    Variant(
        name="shards-swapped",
        meaning="two tensor-parallel halves of the routed experts' down projection are taken for each other",
        remedy="check the order of ranks; serve with one rank less to see whether it goes away",
        activation=_swap_shards,
    ),
    Variant(
        name="yarn-off",
        meaning="rotary positions are not stretched by YaRN",
        remedy="check rope_scaling in config.json, and which rope class the engine's log names",
        config=_yarn(lambda factor: 1.0),
    ),
    Variant(
        name="yarn-half",
        meaning="YaRN's factor is half of what config.json says",
        remedy="check rope_scaling.factor in config.json and overrides on the command line",
        config=_yarn(lambda factor: factor / 2),
    ),
    Variant(
        name="softmax-scale",
        meaning="attention scores lack YaRN's factor on the softmax",
        remedy="check that the engine multiplies the scale by mscale squared (2.0047 for the published model)",
        config=_without_magnitude,
    ),
    Variant(
        name="padding-after-normalizing",
        meaning="images are padded after they are normalized, with grey in place of black",
        remedy="check that the engine's image processor is the plugin's: `k26 doctor`",
        padding=0.0,
    ),
)
BY_NAME = {variant.name: variant for variant in VARIANTS}
