"""The parts that the reports share: a check as a line of text, a self-contained HTML page, and figures for the page."""

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
"""The smallest KL that is drawn: smaller values are drawn as this one, since a logarithmic axis has no place for 0."""
_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Section:
    """One part of a page: its checks, lists of further lines, the probable causes, and an optional heading."""

    checks: Sequence[Check]
    lists: Sequence[Sequence[str]]
    causes: Sequence[Cause] = ()
    heading: str = ""


def check_lines(checks: Iterable[Check]) -> list[str]:
    """Return a line of text for each check: whether it passed, its name and its detail."""
    return [f"  {'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in checks]


def page(title: str, heading: str, below: str, sections: Iterable[Section], figures: Iterable[Figure]) -> str:
    """Return a page of HTML that needs no other file, because the figures are embedded as SVG.

    title: for the browser's tab. heading: at the top of the page. below: a line under the heading.
    """
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
    """Return an empty figure of this height in inches, and its axes.

    Raises ImportError without matplotlib: `pip install 'k26-plugins[report]'`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shares_below(curves: Iterable[tuple[str, Sequence[float], str | None]], distance: str) -> Figure:
    """Draw for each curve the share of positions whose KL is below the value on the x axis.

    curves: (label, KLs, colour), where matplotlib chooses the colour if it is None. distance: what the KL is measured
    from, in words.
    """
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
