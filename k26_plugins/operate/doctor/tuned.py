"""Examine what `k26 tune` measured on this machine's GPU, and which experts a server chooses from it."""

from __future__ import annotations

import torch

from k26_plugins.common.experts.outcome import OURS, Key, Outcome, OutcomeError, read_outcome
from k26_plugins.common.experts.rule import choose
from k26_plugins.common.experts.triton import unusable_on
from k26_plugins.common.experts.tuned import ENGINES, here, installed_engine
from k26_plugins.common.host.cache_folder import outcome_folder
from k26_plugins.common.settings import TUNED
from k26_plugins.operate.doctor.engines import is_installed
from k26_plugins.operate.doctor.finding import Finding, Level

TITLE = "experts: tuned"


def tuned_findings(device: torch.device) -> list[Finding]:
    """Return, for each outcome of `k26 tune` on this kind of GPU, which experts it chooses or why no server uses it."""
    reason = unusable_on(device)
    if reason is not None:
        return [Finding(Level.NOTE, TITLE, f"servers take the engine's own experts: {reason.rstrip('.')}")]
    try:
        given = TUNED.read()
    except ValueError as error:
        return [Finding(Level.BAD, TITLE, str(error), *[f"unset {TUNED.variable}"] * 2)]
    engines = [installed_engine(name) for name in ENGINES if is_installed(name)]
    files = [given] if given is not None else sorted(outcome_folder().glob("*.json"))
    findings = []
    for file in files:
        try:
            outcome = read_outcome(file)
        except OutcomeError as error:
            findings.append(Finding(Level.BAD, TITLE, str(error), "a server takes the engine's own experts"))
            continue
        key = here(device, outcome.key.engine, outcome.key.shape)
        if outcome.key.gpu == key.gpu:
            findings.append(_finding(outcome, key, engines, f"{TUNED.variable}={file}" if given else str(file), given))
    if not findings:
        detail = "nothing was measured on this GPU: servers take the engine's own experts"
        findings.append(Finding(Level.NOTE, TITLE, detail, "`k26 tune` measures which are the fastest that are right"))
    return findings


def _finding(outcome: Outcome, key: Key, engines: list[str], source: str, given: object) -> Finding:
    what = f"{outcome.key.engine}, {outcome.key.shape}"
    differences = outcome.key.differences(key)
    if outcome.key.engine not in engines:
        differences.append(f"engine {' or '.join(engines) or 'none'} instead of {outcome.key.engine}")
    if differences and given is None:
        detail = f"{what}: not used, here is {', '.join(differences)} ({source})"
        return Finding(Level.NOTE, TITLE, detail, "`k26 tune` measures again")
    choice = choose(outcome.timings, outcome.purpose)
    taken = "the core's kernels" if choice.kernel == OURS else "the engine's own experts"
    though = f", though here is {', '.join(differences)}" if differences else ""
    return Finding(Level.OK, TITLE, f"{what}: {taken}, {choice.why} ({source}{though})")
