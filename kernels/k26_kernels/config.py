"""Tile sizes by GPU and shape: measured ones, a default for a GPU where none were, and the choice between regimes."""

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
class Tile:
    """How one GEMM is cut: rows of the weights, inputs at a time, warps, and steps that are loaded ahead."""

    block_rows: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Regime:
    """The tiles of both GEMMs for some number of tokens an expert."""

    block_tokens: int
    w13: Tile
    w2: Tile

    @classmethod
    def of(cls, data: dict[str, Any], intermediate_size: int = 0) -> Self:
        """`w2_N` are the tiles of a rank on which w2 has N inputs, all of them one step."""
        w2 = data.get(f"w2_{intermediate_size}", data["w2"])
        return cls(data["block_tokens"], Tile(**data["w13"]), Tile(**w2))


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


# What `experts.use_tiles` was given in this process, by GPU, hidden and intermediate size.
measured: dict[tuple[Device, int, int], dict[str, Regime]] = {}


@cache
def default_regimes(target: str, intermediate_size: int = 0) -> dict[str, Regime]:
    """Regimes by name for a kind of GPU: they fit the smallest member of its family."""
    tiles = json.loads(DEFAULT.read_text())[target]
    return {name: Regime.of(tiles[name], intermediate_size) for name in tiles}


def regimes(device: Device, shape: Shape) -> dict[str, Regime]:
    """Those that were measured for this GPU and experts of this size, however many, or the default of its kind."""
    inner = shape.intermediate_size
    return measured.get((device, shape.hidden_size, inner)) or default_regimes(device.target.name, inner)


def checked(tiles: dict[str, Any], target: str, shape: Shape) -> dict[str, Regime]:
    """Regimes from a file: of each name the fields, as `dataclasses.asdict` gives them.

    Raises ValueError where they are not those of the regimes that there are, or cannot cut the shape.
    """
    default = default_regimes(target)
    try:
        found = {name: Regime.of(tiles[name]) for name in default}
    except (KeyError, TypeError) as error:
        raise ValueError(f"these are no tiles of the regimes {', '.join(default)}: {error!r}.") from error
    for name, regime in found.items():
        if regime.block_tokens != default[name].block_tokens:
            raise ValueError(
                f"regime {name} has blocks of {default[name].block_tokens} tokens, not {regime.block_tokens}."
            )
        for tile, inputs in ((regime.w13, shape.hidden_size), (regime.w2, shape.intermediate_size)):
            if tile.block_rows not in (ROWS, 2 * ROWS) or inputs % tile.block_k:
                raise ValueError(f"{tile} of regime {name} does not cut {inputs} inputs.")
    return found


def choose(choices: dict[str, Regime], num_tokens: int, pairs_per_expert: float, batch_invariant: bool) -> str:
    """The name of the regime for a batch; batch-invariant always the same."""
    if batch_invariant:
        return INVARIANT
    return SINGLE if num_tokens <= SINGLE_TOKENS else least_work(choices, pairs_per_expert)


def least_work(choices: dict[str, Regime], pairs_per_expert: float) -> str:
    """The name of the regime for pairs that are sorted into blocks.

    An expert's last block is half empty on average, and each block unpacks its tile of weights again. Unpacking and the
    matrix instructions overlap; that a quarter of the shorter does not is a guess. The least work wins.
    """

    def work(name: str) -> float:
        block = choices[name].block_tokens
        blocks = max(1.0, pairs_per_expert / block + 0.5)
        return blocks * (max(block, UNPACK_TOKENS) + min(block, UNPACK_TOKENS) / 4)

    return min((name for name in choices if name != SINGLE), key=work)
