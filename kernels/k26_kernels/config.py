"""Hold the kernel configs (tile sizes, warps, stages) of a GPU and shape, measured or default, and choose a batch's.

The sizes are named as in vLLM's fused_moe: M counts token–expert pairs, N rows of the weights, K inputs. There is no
GROUP_SIZE_M, because all blocks of an expert take a tile of its weights in turn, whatever the config.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from k26_kernels.layout import K_MULTIPLE, ROWS
from k26_kernels.target import Device

DEFAULT = Path(__file__).parent / "configs" / "default.json"
SINGLE = "single"
INVARIANT = "16"
# Up to this many tokens, sorting the pairs would cost more than reading an expert twice if two tokens chose it.
SINGLE_TOKENS = 4
# Unpacking a tile of weights takes as long as the matrix instructions for this many tokens: for 64 rows and 128 inputs
# a warp issues 270 instructions, compared with the matmul rate of an H200. This was counted in the compiled code and
# not measured.
UNPACK_TOKENS = 56


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """The tiling of one GEMM.

    A tile has BLOCK_SIZE_N rows of the weights, a step along K BLOCK_SIZE_K inputs; num_stages steps are under way.
    """

    BLOCK_SIZE_N: int
    BLOCK_SIZE_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The configs of both GEMMs for some number of tokens of an expert. BLOCK_SIZE_M: the most pairs in a block."""

    BLOCK_SIZE_M: int
    w13: GemmConfig
    w2: GemmConfig

    @classmethod
    def of(cls, data: dict[str, Any], intermediate_size: int = 0) -> Self:
        """Return the config that one entry of a file of configs describes.

        `w2_N` in `data` is the config of w2 for a rank on which w2 has N inputs, which are all one step.
        """
        w2 = data.get(f"w2_{intermediate_size}", data["w2"])
        return cls(data["BLOCK_SIZE_M"], GemmConfig(**data["w13"]), GemmConfig(**w2))


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one layer's routed experts on one rank. Raises ValueError if the layout cannot hold them."""

    hidden_size: int
    intermediate_size: int
    num_experts: int

    def __post_init__(self) -> None:
        if self.hidden_size % K_MULTIPLE or self.intermediate_size % K_MULTIPLE:
            raise ValueError(
                f"the Triton kernels need a hidden and an intermediate size that are multiples of {K_MULTIPLE}, on each "
                f"rank: these are {self.hidden_size} and {self.intermediate_size}."
            )

    @property
    def key(self) -> str:
        """The shape's name in the outcome of a measurement."""
        return f"{self.hidden_size}x{self.intermediate_size}x{self.num_experts}"


# The configs that `experts.use_configs` was given in this process, by GPU, hidden size and intermediate size.
measured: dict[tuple[Device, int, int], dict[str, KernelConfig]] = {}


@cache
def default_configs(target: str, intermediate_size: int = 0) -> dict[str, KernelConfig]:
    """Return the default configs by name for a kind of GPU; they fit the smallest member of its family."""
    found = json.loads(DEFAULT.read_text())[target]
    return {name: KernelConfig.of(found[name], intermediate_size) for name in found}


def kernel_configs(device: Device, shape: Shape) -> dict[str, KernelConfig]:
    """Return the configs measured for this GPU and experts of this size, or the default ones for its kind of GPU.

    Measured configs hold for any number of experts.
    """
    intermediate_size = shape.intermediate_size
    return measured.get((device, shape.hidden_size, intermediate_size)) or default_configs(
        device.target.name, intermediate_size
    )


def checked(data: dict[str, Any], target: str, shape: Shape) -> dict[str, KernelConfig]:
    """Return the configs that `data` describes: for each name its fields, as `dataclasses.asdict` gives them.

    Raises ValueError if names or block sizes are not those of the default, or if a config cannot cut the shape.
    """
    default = default_configs(target)
    try:
        found = {name: KernelConfig.of(data[name]) for name in default}
    except (KeyError, TypeError) as error:
        raise ValueError(f"these are not the kernel configs {', '.join(default)}: {error!r}.") from error
    for name, config in found.items():
        if config.BLOCK_SIZE_M != default[name].BLOCK_SIZE_M:
            raise ValueError(
                f"config {name} has blocks of {default[name].BLOCK_SIZE_M} tokens, not {config.BLOCK_SIZE_M}."
            )
        for gemm, in_features in ((config.w13, shape.hidden_size), (config.w2, shape.intermediate_size)):
            if gemm.BLOCK_SIZE_N not in (ROWS, 2 * ROWS) or in_features % gemm.BLOCK_SIZE_K:
                raise ValueError(f"{gemm} of config {name} does not cut {in_features} inputs.")
    return found


def choose(choices: dict[str, KernelConfig], num_tokens: int, pairs_per_expert: float, batch_invariant: bool) -> str:
    """Return the name of the config for a batch; with `batch_invariant` it is the same for every batch."""
    if batch_invariant:
        return INVARIANT
    return SINGLE if num_tokens <= SINGLE_TOKENS else least_work(choices, pairs_per_expert)


def least_work(choices: dict[str, KernelConfig], pairs_per_expert: float) -> str:
    """Return the name of the config that takes the least work for pairs that are sorted into blocks.

    An expert's last block is half empty on average, and each block unpacks its tile of weights again. Unpacking
    overlaps with the matrix instructions; it is a guess that a quarter of the shorter of the two does not overlap.
    """

    def work(name: str) -> float:
        block = choices[name].BLOCK_SIZE_M
        blocks = max(1.0, pairs_per_expert / block + 0.5)
        return blocks * (max(block, UNPACK_TOKENS) + min(block, UNPACK_TOKENS) / 4)

    return min((name for name in choices if name != SINGLE), key=work)
