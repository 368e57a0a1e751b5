"""Report a run as text, as JSON, and as one HTML page with a timeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from k26_plugins import __version__
from k26_plugins.operate.swarm.client import OK, Step
from k26_plugins.operate.swarm.judge import Figures, Verdict
from k26_plugins.operate.swarm.run import Run
from k26_plugins.operate.verify.page import Section, check_lines, empty_figure, page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WAITING, _STREAMING, _FAILED = "#bbbbbb", "#3465a4", "#cc0000"
_TIMELINE = ("agent", "turn", "kind", "sent", "first", "ended", "prompt_tokens", "completion_tokens", "outcome")


def as_text(url: str, engine: str, figures: Figures, verdict: Verdict) -> str:
    """Return the figures, the checks and the verdict as a dozen lines for a terminal."""
    word = "the server holds this swarm" if verdict.passed else "the server does NOT hold this swarm"
    return "\n".join([f"{url}: {engine}", *_lines(figures), *check_lines(verdict.checks), f"verdict: {word}"])


def as_json(url: str, engine: str, run: Run, figures: Figures, verdict: Verdict) -> dict[str, Any]:
    """Return the whole run, with the times of every step, as a mapping that can be written as JSON."""
    rates = {
        "prompt_tokens_per_second": figures.prompt_tokens_per_second,
        "completion_tokens_per_second": figures.completion_tokens_per_second,
    }
    attacks = Counter((attack.kind, attack.name, attack.outcome) for attack in run.extras.attacks)
    return {
        "k26_plugins": __version__,
        "url": url,
        "engine": engine,
        "passed": verdict.passed,
        "shape": asdict(run.shape),
        "load": asdict(run.load) | {"pid": None},
        "figures": asdict(figures) | rates,
        "checks": [asdict(check) for check in verdict.checks],
        "faults": [asdict(fault) for fault in verdict.faults],
        "asked_again": None if verdict.compared is None else asdict(verdict.compared),
        "adversarial": [
            {"kind": kind, "name": name, "outcome": outcome, "count": count}
            for (kind, name, outcome), count in sorted(attacks.items())
        ],
        "memory": [[round(at, 1), size] for at, size in run.memory],
        "step_fields": _TIMELINE,
        "steps": [[_rounded(getattr(step, name)) for name in _TIMELINE] for step in run.steps],
    }


def as_html(url: str, engine: str, run: Run, figures: Figures, verdict: Verdict) -> str:
    """Return one HTML page that needs no other file. This needs matplotlib: `pip install 'k26-plugins[report]'`."""
    shape = run.shape
    pace = f"{run.load.rate:g} arrivals/s" if run.load.rate else f"{run.load.concurrency or shape.agents} at once"
    lists = (
        [line.strip() for line in _lines(figures)],
        [f"agent {fault.agent}, turn {fault.turn}: {fault.what}" for fault in verdict.faults[:50]],
    )
    drawn = [_lanes(run), _over_time(run), _spread(run)]
    if run.memory:
        drawn.insert(2, _memory(run))
    return page(
        "k26 swarm",
        f"{engine} {'holds' if verdict.passed else 'does not hold'} a swarm of {shape.agents} agents",
        f"{url}, {shape.steps} steps, {pace}, seed {shape.seed}",
        [Section(verdict.checks, lists)],
        drawn,
    )


def _lines(figures: Figures) -> list[str]:
    def shown(values: dict[int, float]) -> str:
        return ", ".join(f"p{p} {value:.3f} s" for p, value in values.items()) or "no answer"

    hits = "not offered by its /metrics" if figures.prefix_hit_rate is None else f"{figures.prefix_hit_rate:.1%}"
    lines = [
        f"  {figures.steps} steps in {figures.seconds:.1f} s: {figures.requests_per_second:.2f} requests/s, "
        f"{figures.prompt_tokens_per_second:.0f} prompt and "
        f"{figures.completion_tokens_per_second:.1f} output tokens/s",
        f"  time to first token: {shown(figures.ttft)}",
        f"  inter-token latency: {shown(figures.inter_token)}",
        f"  prefix cache: {hits} of the prompt tokens found",
        f"  tool calls: {figures.tool_calls} of the model's own, {figures.malformed_calls} malformed; the rest is scripted",
    ]
    if figures.late:
        lines.append(f"  arrivals that waited for an agent: {shown(figures.late)}")
    if figures.memory_mean is not None:
        lines.append(f"  resident memory of the server: {figures.memory_mean / 2**30:.2f} GiB in the mean")
    return lines


def _lanes(run: Run) -> Figure:
    """Draw a lane for each agent: grey while it waits for a first token, blue while it streams, red if a step failed.

    A lane is empty while tools work and while the agent waits for its turn.
    """
    figure, axes = empty_figure(5)
    waiting = [(step.agent, step.sent, step.first or step.ended) for step in run.steps if step.outcome == OK]
    streaming = [(step.agent, step.first or step.ended, step.ended) for step in run.steps if step.outcome == OK]
    failed = [(step.agent, step.sent, step.ended) for step in run.steps if step.outcome != OK]
    for spans, colour, label in (
        (waiting, _WAITING, "waits for its first token"),
        (streaming, _STREAMING, "streams"),
        (failed, _FAILED, "failed"),
    ):
        if spans:
            agents, begins, ends = zip(*spans, strict=True)
            # The lanes are drawn as pixels, because thousands of vector lines would make a page of megabytes.
            axes.hlines(agents, begins, ends, color=colour, lw=0.8, label=label, rasterized=True)
    axes.set(xlabel="seconds", ylabel="agent (the orchestrator is −1)", xlim=(0, None))
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    return figure


def _over_time(run: Run) -> Figure:
    """Draw the requests in flight over time, and each request's time to first token at the time it was sent."""
    figure, axes = empty_figure(3.5)
    events = sorted([(step.sent, 1) for step in run.steps] + [(step.ended, -1) for step in run.steps])
    level, xs, ys = 0, [], []
    for at, change in events:
        level += change
        xs.append(at)
        ys.append(level)
    axes.step(xs, ys, where="post", color="#999999", lw=0.8, label="requests in flight")
    axes.set(xlabel="seconds", ylabel="requests in flight", xlim=(0, None), ylim=(0, None))
    other = axes.twinx()
    points = [(step.sent, _ttft(step)) for step in run.steps if step.first is not None]
    if points:
        other.plot(
            *zip(*points, strict=True), ".", ms=2, color=_STREAMING, label="time to first token", rasterized=True
        )
    other.set(ylabel="time to first token, s", ylim=(0, None))
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    return figure


def _memory(run: Run) -> Figure:
    figure, axes = empty_figure(2.5)
    axes.plot([at for at, _ in run.memory], [size / 2**30 for _, size in run.memory], color="#4e9a06", lw=1)
    axes.set(xlabel="seconds", ylabel="server's memory, GiB", xlim=(0, None), ylim=(0, None))
    return figure


def _spread(run: Run) -> Figure:
    """Draw the cumulative distributions of the time to first token and of the inter-token latency."""
    figure, axes = empty_figure(3)
    for label, values, colour in (
        ("time to first token", [_ttft(step) for step in run.steps if step.first is not None], _STREAMING),
        ("inter-token latency", [gap for step in run.steps for gap in step.gaps], "#c17d11"),
    ):
        # A few hundred points draw the same curve as all of them.
        ordered = sorted(values)
        kept = range(0, len(ordered), max(1, len(ordered) // 400))
        axes.semilogx(
            [max(ordered[i], 1e-5) for i in kept], [(i + 1) / len(ordered) for i in kept], color=colour, label=label
        )
    axes.set(xlabel="seconds", ylabel="share below", ylim=(0, 1))
    axes.legend(fontsize=8)
    return figure


def _ttft(step: Step) -> float:
    assert step.first is not None
    return step.first - step.sent


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
