"""What the reports share: a check as a line of text, one HTML page that needs nothing beside it, figures for it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k26_plugins import __version__
from k26_plugins.operate.verify.judge import Cause, Check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST = 1e-7
"""What is drawn for a KL of 0, at the bottom and not lost."""
_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Section:
    """A part of a page: what was checked, what is probably wrong, and lists of lines."""

    checks: Sequence[Check]
    lists: Sequence[Sequence[str]]
    causes: Sequence[Cause] = ()
    heading: str = ""


def check_lines(checks: Iterable[Check]) -> list[str]:
    return [f"  {'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in checks]


def page(title: str, heading: str, below: str, sections: Iterable[Section], figures: Iterable[Figure]) -> str:
    """below: a line under the heading."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        heading=heading,
        below=below,
        version=__version__,
        sections=sections,
        figures=[_svg(figure) for figure in figures],
    )


def empty_figure(height: float) -> tuple[Figure, Any]:
    """A figure and its axes. Needs matplotlib: `pip install 'k26-plugins[report]'`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shares_below(curves: Iterable[tuple[str, Sequence[float], str | None]], distance: str) -> Figure:
    """Draw the share of positions below each KL. curves: label, KLs and colour. distance: what the KL is from."""
    figure, axes = empty_figure(3)
    for label, values, colour in curves:
        ordered = sorted(max(value, SMALLEST) for value in values)
        axes.semilogx(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], color=colour, label=label)
    axes.set(xlabel=f"KL from {distance}", ylabel="share of positions below", ylim=(0, 1))
    axes.legend(fontsize=8)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
