"""What the reports share: a check as a line of text, one HTML page that needs nothing beside it, figures for it."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from k26_plugins import __version__
from k26_plugins.operate.verify.judge import Check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALLEST = 1e-7
"""What is drawn for a KL of 0, at the bottom and not lost."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
td { padding: .2rem .8rem .2rem 0; vertical-align: top } .fail td:first-child { color: #b00; font-weight: bold }
.pass td:first-child { color: #373 } svg { max-width: 100%; height: auto } dt { font-weight: bold; margin-top: .6rem }
"""


def check_lines(checks: Iterable[Check]) -> list[str]:
    return [f"  {_word(check)}  {check.name}: {check.detail}" for check in checks]


def page(title: str, parts: Iterable[str], figures: Iterable[Figure]) -> str:
    """parts: HTML, as `heading`, `checks_table` and others make it."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>{_STYLE}</style>
{"".join(parts)}
{"".join(_svg(figure) for figure in figures)}
</html>
"""


def heading(text: str, below: str) -> str:
    return f"<h1>{html.escape(text)}</h1>\n<p>{html.escape(below)}, k26-plugins {__version__}</p>\n"


def checks_table(checks: Iterable[Check]) -> str:
    rows = "".join(
        f"<tr class={'pass' if check.passed else 'fail'}><td>{_word(check)}</td>"
        f"<td>{html.escape(check.name)}</td><td>{html.escape(check.detail)}</td></tr>"
        for check in checks
    )
    return f"<table>{rows}</table>\n"


def bullets(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>\n"


def empty_figure(height: float) -> tuple[Figure, Any]:
    """A figure and its axes. Needs matplotlib: `pip install 'k26-plugins[report]'`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shares_below(curves: Iterable[tuple[str, Sequence[float], str | None]], distance: str) -> Figure:
    """Of each label, its KLs and its colour: the share of positions below each KL. distance: what the KL is from."""
    figure, axes = empty_figure(3)
    for label, values, colour in curves:
        ordered = sorted(max(value, SMALLEST) for value in values)
        axes.semilogx(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], color=colour, label=label)
    axes.set(xlabel=f"KL from {distance}", ylabel="share of positions below", ylim=(0, 1))
    axes.legend(fontsize=8)
    return figure


def _word(check: Check) -> str:
    return "pass" if check.passed else "FAIL"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
