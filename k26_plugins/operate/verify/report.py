"""Show the verdict of `k26 verify` as text, as JSON, and as one HTML page."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from k26_plugins import __version__
from k26_plugins.operate.golden import Golden
from k26_plugins.operate.verify.judge import Verdict, large, typical_bound
from k26_plugins.operate.verify.localize import EXPERT, Localizer
from k26_plugins.operate.verify.measure import ANSWER, IMAGE, TEXT, Measured
from k26_plugins.operate.verify.page import SMALLEST, Section, check_lines, empty_figure, page, shares_below

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {TEXT: "#3465a4", IMAGE: "#c17d11", ANSWER: "#4e9a06"}


def as_text(measured: Measured, verdict: Verdict) -> str:
    """Return the verdict as about a dozen lines for a terminal."""
    lines = [f"{measured.url}: {measured.engine}"]
    lines += check_lines(verdict.checks)
    for cause in verdict.causes:
        lines += [f"  probably: {cause.what}", f"    because {cause.evidence}", f"    remedy: {cause.remedy}"]
    lines += [f"  first divergence in {entry}" for entry in verdict.diverged]
    lines += [f"  not shown: {entry}" for entry in measured.not_shown]
    lines.append(f"  smallest fault that these prompts find: {verdict.smallest}")
    lines.append(f"verdict: {'the endpoint answers as the reference does' if verdict.passed else 'it does NOT'}")
    return "\n".join(lines)


def as_json(golden: Golden, measured: Measured, verdict: Verdict) -> dict[str, Any]:
    """Return the verdict and the measured distances, as values that `json.dumps` takes."""
    return {
        "k26_plugins": __version__,
        "url": measured.url,
        "engine": measured.engine,
        "fingerprint": golden.info["fingerprint"],
        "passed": verdict.passed,
        "checks": [asdict(check) for check in verdict.checks],
        "causes": [asdict(cause) for cause in verdict.causes],
        "places": [{**asdict(place), "what": place.what} for place in verdict.places[:10]],
        "smallest_fault_found": verdict.smallest,
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
    """Return the verdict as an HTML page that needs no other file.

    Raises ImportError without matplotlib: `pip install 'k26-plugins[report]'`.
    """
    curves = (
        ("endpoint", [position.kl for position in measured.positions], "#3465a4"),
        ("bfloat16", [position.noise for position in measured.positions], "#999999"),
    )
    figures = [_over_positions(golden, measured), shares_below(curves, "the reference")]
    if len(golden.prompts[0].experts.flatten()):
        figures.append(_experts(golden, measured, verdict))
    word = "answers as the reference does" if verdict.passed else "does not answer as the reference does"
    weights = golden.info["fingerprint"][:23]
    lines = [*verdict.diverged, *measured.not_shown]
    return page(
        "k26 verify",
        f"{measured.engine} {word}",
        f"{measured.url}, against {len(golden.prompts)} prompts of weights {weights}…",
        [Section(verdict.checks, [lines], verdict.causes)],
        figures,
    )


def _over_positions(golden: Golden, measured: Measured) -> Figure:
    """Draw the KL at every position, prompts side by side, with the KL that rounding alone makes in grey."""
    figure, axes = empty_figure(4)
    axes.semilogy(
        [max(position.noise, SMALLEST) for position in measured.positions], color="#bbbbbb", lw=0.8, label="bfloat16"
    )
    for kind, colour in COLOURS.items():
        points = [(x, max(p.kl, SMALLEST)) for x, p in enumerate(measured.positions) if p.kind == kind]
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


def _experts(golden: Golden, measured: Measured, verdict: Verdict) -> Figure:
    """Draw the score of each routed expert, with a row for each layer: a single dark cell is a faulty expert."""
    figure, axes = empty_figure(3)
    scores = Localizer(golden, measured.positions).scores(EXPERT).numpy()
    image = axes.imshow(scores, aspect="auto", cmap="RdGy_r", vmin=-8, vmax=8, interpolation="nearest")
    axes.set(xlabel="expert", ylabel="MoE layer")
    first = golden.info["first_moe_layer"]
    shown = range(0, len(scores), max(1, len(scores) // 10))
    axes.set_yticks(shown, [str(first + layer) for layer in shown])
    figure.colorbar(image, label="how far its tokens rank above others (σ)")
    place = next((place for place in verdict.places if place.found and place.expert >= 0), None)
    if place is not None:
        axes.plot(place.expert, place.layer - first, "o", mfc="none", mec="#000000", ms=14)
    return figure
