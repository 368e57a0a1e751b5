"""Compute a run's figures, and judge whether the server passed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

import numpy as np

from k26_plugins.operate.swarm.accounting import Accountant
from k26_plugins.operate.swarm.client import OK, digest
from k26_plugins.operate.swarm.integrity import Comparisons, Fault, compare_alone, wrong_count, wrong_secret
from k26_plugins.operate.swarm.memory import FLAT, growth
from k26_plugins.operate.swarm.metrics import hit_rate
from k26_plugins.operate.swarm.run import Run
from k26_plugins.operate.swarm.tools import TOOLS
from k26_plugins.operate.verify.judge import Check

PERCENTILES = (50, 90, 99)


@dataclass
class Figures:
    """The measured figures of a run."""

    seconds: float
    """Seconds from the first request to the last answer, without the requests that are sent again alone."""
    steps: int
    ttft: dict[int, float]
    """Seconds from sending a request to the first piece of its answer, by percentile."""
    inter_token: dict[int, float]
    """Seconds between the pieces of a stream, by percentile."""
    late: dict[int, float]
    """Seconds that an arrival waited for its agent to be ready, by percentile; empty in a closed loop."""
    requests_per_second: float
    """Requests per second that were answered without an error."""
    prompt_tokens: int
    completion_tokens: int
    prefix_hit_rate: float | None
    """The share of prompt tokens that were found in the prefix cache; None if the server does not report it."""
    errors: dict[str, int]
    """Number of failed steps by the kind of error."""
    tool_calls: int
    """Number of the model's own tool calls that could be carried out."""
    malformed_calls: int
    """Number of the model's own tool calls that could not be carried out."""
    memory_growth: float | None
    """The growth of the server's resident memory as a share, from `memory.growth`; None if it was not judged."""
    memory_mean: float | None
    """The mean resident memory of the server in bytes; None if it was not sampled."""

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens of the run, divided by its seconds."""
        return self.prompt_tokens / self.seconds

    @property
    def completion_tokens_per_second(self) -> float:
        """Tokens of the answers of the run, divided by its seconds."""
        return self.completion_tokens / self.seconds


@dataclass
class Verdict:
    """The checks of a run, and the faults that they found."""

    checks: list[Check]
    faults: list[Fault] = field(default_factory=list)
    compared: Comparisons | None = None
    """How the answers compare with those of the same requests sent again alone; None if none was sent again."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def figures_of(run: Run) -> Figures:
    """Return the figures of a run."""
    steps = run.steps
    good = [step for step in steps if step.outcome == OK]
    return Figures(
        seconds=run.seconds,
        steps=len(steps),
        ttft=percentiles([step.first - step.sent for step in good if step.first is not None]),
        inter_token=percentiles([gap for step in good for gap in step.gaps]),
        late=percentiles([step.late for step in steps] if run.load.rate is not None else []),
        requests_per_second=len(good) / run.seconds,
        prompt_tokens=sum(step.prompt_tokens or 0 for step in good),
        completion_tokens=sum(step.completion_tokens for step in good),
        prefix_hit_rate=hit_rate(run.cache_before, run.cache_after),
        errors=dict(Counter(step.outcome for step in steps if step.outcome != OK)),
        tool_calls=run.tool_calls,
        malformed_calls=run.malformed_calls,
        memory_growth=growth(run.memory),
        memory_mean=mean(size for _, size in run.memory) if run.memory else None,
    )


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """Return the PERCENTILES of the values; empty without values."""
    return {p: float(np.percentile(values, p)) for p in PERCENTILES} if values else {}


def judge(
    run: Run,
    accountant: Accountant | None,
    *,
    secrets: bool,
    deterministic: bool = False,
    on_prompt: Callable[[], None] = lambda: None,
) -> Verdict:
    """Judge a run by all checks that it allows.

    accountant: computes the core's token ids of each prompt; None leaves prompts unchecked. secrets: whether to check
    code words, for a model that can repeat them. deterministic: whether requests sent again alone must get the same
    answers word for word. on_prompt: called once for each step, if there is an accountant.
    """
    verdict = Verdict([_answered(run)])
    if accountant is not None:
        verdict.checks.append(_accounting(run, accountant, verdict.faults, on_prompt))
    if secrets:
        verdict.checks.append(_secrets(run, verdict.faults))
    if run.replayed:
        verdict.checks += _replays(run, verdict, deterministic=deterministic)
    change = growth(run.memory)
    if change is not None:
        detail = f"the last quarter holds {change:+.1%} of the second quarter's (bound {FLAT:+.0%})"
        verdict.checks.append(Check("memory", change <= FLAT, detail))
    if run.extras.attacks:
        verdict.checks.append(_adversarial(run))
    if run.load.drops:
        rest = run.extras.undropped
        detail = f"{run.extras.drops} streams left after their first piece"
        verdict.checks.append(Check("dropped clients", not rest, "; ".join([detail, *rest[:3]])))
    return verdict


def _answered(run: Run) -> Check:
    steps = run.steps
    errors = Counter(f"{step.outcome} ({step.detail[:120]})" for step in steps if step.outcome != OK)
    wanted = run.shape.steps
    answered = len(steps) - errors.total()
    detail = f"{answered} of {wanted} steps by {run.shape.agents} agents"
    missing = wanted - len(steps)
    listed = [f"{count} × {what}" for what, count in errors.most_common(5)]
    if missing:
        listed.append(f"{missing} not sent, because their agent's conversation was lost")
    return Check("answered", answered == wanted, "; ".join([detail, *listed]))


def _accounting(run: Run, accountant: Accountant, faults: list[Fault], on_prompt: Callable[[], None]) -> Check:
    found: list[Fault] = []
    counted = by_ids = 0
    for conversation in run.conversations:
        for step, length in conversation.asked:
            if step.outcome == OK:
                expected = accountant.token_ids(conversation.messages[:length], TOOLS, run.load.thinking)
                fault = wrong_count(step, expected, digest(expected))
                found += [fault] if fault else []
                counted += 1
                by_ids += step.prompt_digest is not None
            on_prompt()
    faults += found
    detail = f"{counted} prompts hold the tokens that the core counts, {by_ids} of them compared id by id"
    return Check("token accounting", not found, detail if not found else _first(found, counted))


def _secrets(run: Run, faults: list[Fault]) -> Check:
    agents = [conversation.agent for conversation in run.conversations if conversation.agent is not None]
    owners = {agent.secret: agent.number for agent in agents}
    found: list[Fault] = []
    asked = 0
    for conversation in run.conversations:
        for step, _ in conversation.asked if conversation.agent is not None else ():
            assert conversation.agent is not None
            # An answer that the token limit cut might still have said the code word, so it is not asked for.
            last = step.turn + 1 == conversation.agent.turns and step.finish_reason == "stop"
            asked += last
            fault = wrong_secret(step, conversation.agent, owners, asked=last)
            found += [fault] if fault else []
    faults += found
    return Check("secrets", not found, f"{asked} agents know theirs" if not found else _first(found, asked))


def _replays(run: Run, verdict: Verdict, *, deterministic: bool) -> list[Check]:
    failed = [again for _, again in run.replayed if again.outcome != OK]
    pairs = [(live, alone) for live, alone in run.replayed if alone.outcome == OK]
    verdict.compared = compare_alone([live for live, _ in pairs], [alone for _, alone in pairs])
    if not any(alone.fingerprint for _, alone in pairs):
        mixed = []
        detail = "the endpoint reports no log-probabilities"
    else:
        mixed = verdict.compared.faults()
        detail = f"{len(pairs)} answers are those of their conversations asked again alone"
    verdict.faults += mixed
    same = sum(row.same_text for row in verdict.compared.rows)
    if mixed:
        detail = _first(mixed, len(pairs))
    if failed:
        detail = f"{len(failed)} not answered ({failed[0].outcome}: {failed[0].detail[:120]}); {detail}"
    checks = [Check("asked again alone", not mixed and not failed, f"{detail}; {same} of {len(pairs)} word for word")]
    if deterministic:
        checks.append(Check("deterministic", same == len(pairs), f"{same} of {len(pairs)} answers are the same"))
    return checks


def _adversarial(run: Run) -> Check:
    kinds = Counter(attack.kind for attack in run.extras.attacks)
    bad = [attack for attack in run.extras.attacks if not attack.held]
    detail = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    by_name = Counter(f"{attack.kind}: {attack.name} → {attack.outcome}" for attack in bad)
    listed = [f"{count} × {what}" for what, count in by_name.most_common(6)]
    return Check(
        "adversarial requests",
        not bad,
        "; ".join([f"{detail}, all refused or answered" if not bad else detail, *listed]),
    )


def _first(faults: list[Fault], of: int) -> str:
    shown = "; ".join(f"agent {fault.agent}, turn {fault.turn}: {fault.what}" for fault in faults[:3])
    return f"{len(faults)} of {of}: {shown}"
