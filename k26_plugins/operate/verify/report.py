"""A verdict as text, as JSON, and as one HTML page."""

from __future__ import annotations

import html
import io
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from k26_plugins import __version__
from k26_plugins.operate.golden import Golden
from k26_plugins.operate.verify.experts import expert_scores
from k26_plugins.operate.verify.judge import Verdict, large, typical_bound
from k26_plugins.operate.verify.measure import ANSWER, IMAGE, TEXT, Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {TEXT: "#3465a4", IMAGE: "#c17d11", ANSWER: "#4e9a06"}


def as_text(measured: Measured, verdict: Verdict) -> str:
    """A dozen lines for a terminal."""
    lines = [f"{measured.url}: {measured.engine}"]
    lines += [f"  {'pass' if check.passed else 'FAIL'}  {check.name}: {check.detail}" for check in verdict.checks]
    for cause in verdict.causes:
        lines += [f"  probably: {cause.what}", f"    because {cause.evidence}", f"    remedy: {cause.remedy}"]
    lines += [f"  first divergence in {entry}" for entry in verdict.diverged]
    lines += [f"  not shown: {entry}" for entry in measured.not_shown]
    lines.append(f"verdict: {'the endpoint answers as the reference does' if verdict.passed else 'it does NOT'}")
    return "\n".join(lines)


def as_json(golden: Golden, measured: Measured, verdict: Verdict) -> dict[str, Any]:
    return {
        "k26_plugins": __version__,
        "url": measured.url,
        "engine": measured.engine,
        "fingerprint": golden.info["fingerprint"],
        "passed": verdict.passed,
        "checks": [asdict(check) for check in verdict.checks],
        "causes": [asdict(cause) for cause in verdict.causes],
        "first_divergences": verdict.diverged,
        "not_shown": measured.not_shown,
        "mismatches": [asdict(mismatch) for mismatch in measured.mismatches],
        "positions": [
            {
                "prompt": golden.prompts[position.prompt].name,
                "index": position.index,
                "kind": position.kind,
                "kl": position.kl,
                "noise": position.noise,
            }
            for position in measured.positions
        ],
    }


def as_html(golden: Golden, measured: Measured, verdict: Verdict) -> str:
    """One page that needs nothing beside it. Needs matplotlib: `pip install 'k26-plugins[report]'`."""
    figures = [_over_positions(golden, measured), _distribution(measured)]
    if len(golden.prompts[0].experts.flatten()):
        figures.append(_experts(golden, measured, verdict))
    checks = "".join(
        f"<tr class={'pass' if check.passed else 'fail'}><td>{'pass' if check.passed else 'FAIL'}</td>"
        f"<td>{html.escape(check.name)}</td><td>{html.escape(check.detail)}</td></tr>"
        for check in verdict.checks
    )
    causes = "".join(
        f"<dt>{html.escape(cause.what)}</dt><dd>because {html.escape(cause.evidence)}<br>"
        f"remedy: {html.escape(cause.remedy)}</dd>"
        for cause in verdict.causes
    )
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in [*verdict.diverged, *measured.not_shown])
    word = "answers as the reference does" if verdict.passed else "does not answer as the reference does"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>k26 verify</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
td {{ padding: .2rem .8rem .2rem 0; vertical-align: top }} .fail td:first-child {{ color: #b00; font-weight: bold }}
.pass td:first-child {{ color: #373 }} svg {{ max-width: 100%; height: auto }} dt {{ font-weight: bold; margin-top: .6rem }}
</style>
<h1>{html.escape(measured.engine)} {word}</h1>
<p>{html.escape(measured.url)}, against {len(golden.prompts)} prompts of weights
<code>{html.escape(golden.info["fingerprint"][:23])}…</code>, k26-plugins {__version__}</p>
<table>{checks}</table>
<dl>{causes}</dl>
<ul>{notes}</ul>
{"".join(_svg(figure) for figure in figures)}
</html>
"""


def _figure(height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _over_positions(golden: Golden, measured: Measured) -> Figure:
    """Every position in order, prompts side by side, with what rounding does in grey."""
    figure, axes = _figure(4)
    # Zeros are drawn at the bottom, not lost.
    floor = 1e-7
    axes.semilogy(
        [max(position.noise, floor) for position in measured.positions], color="#bbbbbb", lw=0.8, label="bfloat16"
    )
    for kind, colour in COLOURS.items():
        points = [(x, max(p.kl, floor)) for x, p in enumerate(measured.positions) if p.kind == kind]
        if points:
            axes.semilogy(*zip(*points, strict=True), ".", ms=4, color=colour, label=kind)
    bound = typical_bound(measured.positions)
    axes.axhline(bound, color="#cc0000", lw=0.8, label="bound of the median")
    axes.axhline(large(bound), color="#cc0000", lw=0.8, ls=":", label="beyond rounding")
    for number, prompt in enumerate(golden.prompts):
        start = next((x for x, position in enumerate(measured.positions) if position.prompt == number), None)
        if start is not None:
            axes.axvline(start, color="#dddddd", lw=0.8, zorder=0)
            axes.text(start, 1.0, f" {prompt.name}", transform=axes.get_xaxis_transform(), rotation=30, fontsize=8)
    axes.set(xlabel="positions, prompt by prompt", ylabel="KL from the reference")
    figure.legend(loc="outside lower center", fontsize=8, ncols=6)
    return figure


def _distribution(measured: Measured) -> Figure:
    """The share of positions below each KL: the endpoint's curve should lie on that of rounding."""
    figure, axes = _figure(3)
    for label, values, colour in (
        ("endpoint", [position.kl for position in measured.positions], "#3465a4"),
        ("bfloat16", [position.noise for position in measured.positions], "#999999"),
    ):
        ordered = sorted(max(value, 1e-7) for value in values)
        axes.semilogx(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], color=colour, label=label)
    axes.set(xlabel="KL from the reference", ylabel="share of positions below", ylim=(0, 1))
    axes.legend(fontsize=8)
    return figure


def _experts(golden: Golden, measured: Measured, verdict: Verdict) -> Figure:
    """Each expert's score: a single dark cell is a faulty expert."""
    figure, axes = _figure(3)
    scores = expert_scores(golden, measured.positions).numpy()
    image = axes.imshow(scores, aspect="auto", cmap="RdGy_r", vmin=-8, vmax=8, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer")
    first = golden.info["first_moe_layer"]
    shown = range(0, len(scores), max(1, len(scores) // 10))
    axes.set_yticks(shown, [str(first + layer) for layer in shown])
    figure.colorbar(image, label="how far its tokens rank above others (σ)")
    if verdict.expert is not None:
        axes.plot(verdict.expert.expert, verdict.expert.layer - first, "o", mfc="none", mec="#000000", ms=14)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
