"""The models that one run of the reference carries through the checkpoint side by side.

Beside the right model in float32 goes its twin in bfloat16, which says what rounding alone does to each answer, and a few
suspects: the same model with a mistake that serving code has made or could make. The bytes are read once for all. An
endpoint that answers as a suspect does, and not as the model, has that mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from k26_plugins.common.model.config import TextConfig

MODEL = "model"
TWIN = "bfloat16"
# A suspect answers the first tokens of the first prompts only: enough to be told apart, and little to compute.
SUSPECT_TOKENS = 96
SUSPECT_TEXTS = 4
SUSPECT_IMAGES = 2

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _same_config(config: TextConfig) -> TextConfig:
    return config


def _same_weight(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a carried model differs from the right one."""

    name: str
    meaning: str
    remedy: str = ""
    dtype: torch.dtype = torch.float32
    config: Callable[[TextConfig], TextConfig] = _same_config
    weight: Callable[[str, torch.Tensor], torch.Tensor] = _same_weight
    """Changes a tensor outside the routed experts."""
    activation: Activation = swiglu
    """From a routed expert's gate and up, `[tokens, I]` each, to what its down projection gets."""
    padding: float | None = None
    """Value of padded pixels after normalization."""

    @property
    def is_suspect(self) -> bool:
        return self.name not in (MODEL, TWIN)

    @property
    def on_images_only(self) -> bool:
        return self.padding is not None


def _yarn(factor: Callable[[float], float]) -> Callable[[TextConfig], TextConfig]:
    def change(config: TextConfig) -> TextConfig:
        scaling = config.rope_scaling
        return replace(config, rope_scaling=replace(scaling, factor=factor(scaling.factor)))

    return change


def _without_magnitude(config: TextConfig) -> TextConfig:
    # Both at 0, so that cosine and sine keep their size and the softmax loses its factor.
    return replace(config, rope_scaling=replace(config.rope_scaling, mscale=0.0, mscale_all_dim=0.0))


def _zero_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if name.endswith("e_score_correction_bias") else tensor


def _swap_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu(up, gate)


def _swap_shards(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Halves of the down projection's inputs in each other's place: the same as its columns'."""
    return swiglu(gate, up).roll(gate.shape[-1] // 2, -1)


VARIANTS = (
    Variant(name=MODEL, meaning="the model"),
    Variant(name=TWIN, meaning="the model, rounded as engines round", dtype=torch.bfloat16),
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
