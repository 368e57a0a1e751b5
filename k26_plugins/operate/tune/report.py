"""Show an outcome of `k26 tune` as a table and as a plot."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from k26_plugins.common.experts.outcome import Outcome, Timing


def as_table(outcome: Outcome) -> Table:
    """Return a table of each kernel's milliseconds and error, with a row for each batch; the fastest kernel is bold."""
    kernels = list(dict.fromkeys(timing.kernel for timing in outcome.timings))
    cells = {(timing.routing, timing.tokens, timing.kernel): timing for timing in outcome.timings}
    table = Table("routing", "tokens", *kernels, title=f"{outcome.key.shape} on {outcome.key.gpu}: ms (error)")
    for routing, tokens in dict.fromkeys((timing.routing, timing.tokens) for timing in outcome.timings):
        row = [cells[routing, tokens, kernel] for kernel in kernels]
        best = min((one.milliseconds for one in row if one.milliseconds is not None), default=None)
        table.add_row(routing, str(tokens), *(_cell(one, best) for one in row))
    return table


def _cell(timing: Timing, best: float | None) -> str:
    if timing.milliseconds is None:
        return "-"
    text = f"{timing.milliseconds:.3f} ({timing.error:.1e})"
    return f"[bold]{text}[/]" if timing.milliseconds == best else text


def notes(outcome: Outcome) -> list[str]:
    """Return why kernels have no time: a line for each kernel and reason."""
    return list(dict.fromkeys(f"{timing.kernel}: {timing.note}" for timing in outcome.timings if timing.note))


def plot(outcome: Outcome, file: Path) -> None:
    """Draw time over tokens into `file`, a line for each kernel and routing. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    for kernel, routing in dict.fromkeys((timing.kernel, timing.routing) for timing in outcome.timings):
        points = [
            (timing.tokens, timing.milliseconds)
            for timing in outcome.timings
            if (timing.kernel, timing.routing) == (kernel, routing) and timing.milliseconds is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=f"{kernel}, {routing}")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=f"{outcome.key.shape}, {outcome.key.gpu}")
    axes.legend()
    figure.savefig(file, dpi=120)
