"""Compare all engines and layouts on one machine, one row of a table for each."""

from __future__ import annotations

from dataclasses import dataclass

from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.machine import Machine
from k26_plugins.operate.plan.advise import options_of
from k26_plugins.operate.plan.command import ENGINES
from k26_plugins.operate.plan.fit import Load, fit
from k26_plugins.operate.plan.hybrid import hybrid
from k26_plugins.operate.plan.speed import decode_bound
from k26_plugins.operate.plan.weights import ROUTED

HEADER = ("engine", "layout", "fits", "weights", "KV cache", "longest", "at once", "tokens/s at most", "note")


@dataclass(frozen=True, slots=True)
class Row:
    """One engine with one layout."""

    engine: str
    tensor_parallel: int
    pipeline_parallel: int
    context_parallel: int
    fits: bool
    weight_bytes: int
    """Bytes of weights on each GPU of the fullest stage."""
    kv_tokens: int
    """Tokens of KV cache that fit."""
    largest_context: int
    """Tokens of the longest single request that fits."""
    largest_concurrency: int
    """Number of requests of the load's length that fit at the same time."""
    bound: float | None
    """Tokens per second of one request that published bandwidths allow at most, not a measurement; None if unknown."""
    note: str
    """What else there is to say, such as how a hybrid run divides the experts."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, a cell for each column of HEADER."""
        layout = f"TP{self.tensor_parallel}"
        layout += f" PP{self.pipeline_parallel}" if self.pipeline_parallel > 1 else ""
        layout += f" DCP{self.context_parallel}" if self.context_parallel > 1 else ""
        return (
            self.engine,
            layout,
            "yes" if self.fits else "no",
            f"{self.weight_bytes / 2**30:.1f} GiB",
            f"{self.kv_tokens:,}",
            f"{self.largest_context:,}",
            f"{self.largest_concurrency:,}",
            "" if self.bound is None or not self.fits else f"{self.bound:,.0f}",
            self.note,
        )


def compare(config: K26Config, machine: Machine, load: Load) -> list[Row]:
    """Return a row for each engine and each layout that is possible on the machine."""
    rows = []
    for engine in ENGINES:
        for layout in options_of(config, machine.count, engine):
            found = fit(config, machine.gpu, layout, load)
            fits, weights, tokens, share, note = found.fits, sum(found.weights.values()), found.kv_tokens, 1.0, ""
            if engine == "ktransformers":
                mixed = hybrid(config, found, machine.ram)
                share = mixed.gpu_experts / mixed.num_experts
                fits, tokens, note = mixed.fits, 0 if mixed.gpu_missing else load.tokens, mixed.why
                weights -= round(found.weights[ROUTED] * (1 - share))
            rows.append(
                Row(
                    engine=engine,
                    tensor_parallel=layout.tp,
                    pipeline_parallel=layout.pp,
                    context_parallel=layout.context_parallel,
                    fits=fits,
                    weight_bytes=weights,
                    kv_tokens=tokens,
                    largest_context=min(tokens, found.max_position),
                    largest_concurrency=tokens // (load.tokens // load.concurrency),
                    bound=decode_bound(config, found, 1, load.context, gpu_experts=share),
                    note=note,
                )
            )
    return rows


def as_table(rows: list[Row]) -> str:
    """Return the rows below a header, with their columns aligned, for a terminal."""
    cells = [HEADER, *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
