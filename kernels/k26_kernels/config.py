"""Kernel configs (tile sizes, warps, stages) by GPU and shape: measured ones or a default, and which one a batch takes.

The sizes are named as in vLLM's fused_moe: M counts token–expert pairs, N rows of the weights, K inputs. There is no
GROUP_SIZE_M: all blocks of an expert take a tile of its weights in turn, whatever the config.
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
# Up to as many tokens, sorting the pairs would cost more than reading an expert twice that two of them chose.
SINGLE_TOKENS = 4
# Unpacking a tile of weights takes as long as the matrix instructions of so many tokens: on an H200 the 270 instructions
# that a warp issues for 64 rows and 128 inputs, at the matmul rate. Counted in the compiled code, not measured.
UNPACK_TOKENS = 56


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """How one GEMM is cut: BLOCK_SIZE_N rows of the weights by BLOCK_SIZE_K inputs a step, num_stages steps under way."""

    BLOCK_SIZE_N: int
    BLOCK_SIZE_K: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The configs of both GEMMs for some number of tokens an expert. BLOCK_SIZE_M: the most pairs in a block."""

    BLOCK_SIZE_M: int
    w13: GemmConfig
    w2: GemmConfig

    @classmethod
    def of(cls, data: dict[str, Any], intermediate_size: int = 0) -> Self:
        """`w2_N` is the config of a rank on which w2 has N inputs, all of them one step."""
        w2 = data.get(f"w2_{intermediate_size}", data["w2"])
        return cls(data["BLOCK_SIZE_M"], GemmConfig(**data["w13"]), GemmConfig(**w2))


@dataclass(frozen=True, slots=True)
class Shape:
    """The routed experts of one layer on one rank. Raises ValueError where the layout cannot hold them."""

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
        """What the outcome of a measurement calls the shape."""
        return f"{self.hidden_size}x{self.intermediate_size}x{self.num_experts}"


# What `experts.use_configs` was given in this process, by GPU, hidden and intermediate size.
measured: dict[tuple[Device, int, int], dict[str, KernelConfig]] = {}


@cache
def default_configs(target: str, intermediate_size: int = 0) -> dict[str, KernelConfig]:
    """Configs by name for a kind of GPU: they fit the smallest member of its family."""
    found = json.loads(DEFAULT.read_text())[target]
    return {name: KernelConfig.of(found[name], intermediate_size) for name in found}


def kernel_configs(device: Device, shape: Shape) -> dict[str, KernelConfig]:
    """The configs that were measured for this GPU and experts of this size, however many, or the default of its kind."""
    intermediate_size = shape.intermediate_size
    return measured.get((device, shape.hidden_size, intermediate_size)) or default_configs(
        device.target.name, intermediate_size
    )


def checked(data: dict[str, Any], target: str, shape: Shape) -> dict[str, KernelConfig]:
    """Configs from a file: each name's fields, as `dataclasses.asdict` gives them.

    Raises ValueError where names or block sizes are not the default's, or a config cannot cut the shape.
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
    """The name of the config for a batch; batch-invariant always the same."""
    if batch_invariant:
        return INVARIANT
    return SINGLE if num_tokens <= SINGLE_TOKENS else least_work(choices, pairs_per_expert)


def least_work(choices: dict[str, KernelConfig], pairs_per_expert: float) -> str:
    """The name of the config for pairs that are sorted into blocks.

    An expert's last block is half empty on average, and each block unpacks its tile of weights again. Unpacking and the
    matrix instructions overlap; that a quarter of the shorter does not is a guess. The least work wins.
    """

    def work(name: str) -> float:
        block = choices[name].BLOCK_SIZE_M
        blocks = max(1.0, pairs_per_expert / block + 0.5)
        return blocks * (max(block, UNPACK_TOKENS) + min(block, UNPACK_TOKENS) / 4)

    return min((name for name in choices if name != SINGLE), key=work)
