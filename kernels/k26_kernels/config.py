"""Tile sizes by GPU and shape: data files, a default for a GPU that was never tuned, and the choice between regimes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from k26_kernels.layout import K_MULTIPLE
from k26_kernels.target import Device

FOLDER = Path(__file__).parent / "configs"
DEFAULT = "default.json"
ANY_SHAPE = "any"
SINGLE = "single"
INVARIANT = "16"
# Up to as many tokens, sorting the slots would cost more than reading an expert twice that two of them chose.
SINGLE_TOKENS = 4
# Unpacking a tile of weights, in tokens whose product takes as long: on an H200 the 270 instructions that a warp issues for
# 64 rows and 128 inputs, at the matmul rate. Counted in the compiled code, not measured.
UNPACK_TOKENS = 56


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut: rows of the weights, inputs at a time, warps, and steps that are loaded ahead."""

    block_rows: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Regime:
    """The tiles of both products for some number of tokens an expert."""

    block_tokens: int
    w13: Tile
    w2: Tile

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        return cls(data["block_tokens"], Tile(**data["w13"]), Tile(**data["w2"]))


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
        """What a data file calls the shape."""
        return f"{self.hidden_size}x{self.intermediate_size}x{self.num_experts}"

    @classmethod
    def of(cls, key: str) -> Self:
        """The inverse of `key`."""
        return cls(*map(int, key.split("x")))


def file_name(gpu: str) -> str:
    """The data file of a GPU, by the name that its driver gives."""
    return re.sub(r"[^A-Za-z0-9]+", "_", gpu).strip("_") + ".json"


def read_file(name: str) -> dict[str, dict[str, dict[str, Regime]]]:
    """A data file: regimes by name, for a shape's key or any shape, for a target."""
    data = json.loads((FOLDER / name).read_text())
    return {
        target: {
            shape: {regime: Regime.of(tiles) for regime, tiles in regimes.items()} for shape, regimes in shapes.items()
        }
        for target, shapes in data.items()
    }


def tuned_shapes(device: Device) -> dict[str, dict[str, Regime]]:
    """What was tuned on this kind of GPU: regimes by name, for each shape's key."""
    name = file_name(device.name)
    return read_file(name).get(device.target.name, {}) if (FOLDER / name).exists() else {}


def is_tuned(device: Device) -> bool:
    """Whether the kernels were measured on this kind of GPU, for some shape."""
    return bool(tuned_shapes(device))


@cache
def regimes(device: Device, shape: Shape) -> dict[str, Regime]:
    """The tuned regimes of this GPU and shape, or the default of its kind."""
    return tuned_shapes(device).get(shape.key) or read_file(DEFAULT)[device.target.name][ANY_SHAPE]


def choose(choices: dict[str, Regime], num_tokens: int, slots_per_expert: float, batch_invariant: bool) -> str:
    """The name of the regime for a batch; batch-invariant always the same.

    An expert's last block is half empty on average, and each block unpacks its tile of weights again. Unpacking and the
    matrix instructions overlap; that a quarter of the shorter does not is a guess. The least work wins.
    """
    if batch_invariant:
        return INVARIANT
    if num_tokens <= SINGLE_TOKENS:
        return SINGLE

    def work(name: str) -> float:
        block = choices[name].block_tokens
        blocks = max(1.0, slots_per_expert / block + 0.5)
        return blocks * (max(block, UNPACK_TOKENS) + min(block, UNPACK_TOKENS) / 4)

    return min((name for name in choices if name != SINGLE), key=work)
