"""From what was measured to a verdict, and to where a fault sits.

Rounding sets the bounds: at each position the golden file knows how far the reference in bfloat16 is from the reference in
float32. An engine rounds too, at other places, so it is held to a few times that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from k26_plugins.operate.golden import Golden
from k26_plugins.operate.golden.variants import BY_NAME
from k26_plugins.operate.verify.distance import allowed_share, share_above
from k26_plugins.operate.verify.experts import ExpertFinding, suspicious_expert
from k26_plugins.operate.verify.measure import ANSWER, IMAGE, TEXT, Measured, Position

# Times the twin's median. On CPUs and the tiny checkpoint vLLM 0.32.0 is at 0.9 (text), 1.5 (images) and 1.0 (answers),
# SGLang 0.5.23 at 0.7, 0.6 and 0.8; the mildest seeded fault, YaRN's factor halved, is above 10.
TYPICAL_FACTOR = 4.0
TYPICAL_FLOOR = 2e-5
# Positions far beyond rounding: a token that rounding sent to other experts. Engines have as many as the twin has.
LARGE_FACTOR = 100.0
LARGE_FLOOR = 1e-2
LARGE_SHARE_FACTOR = 3.0
LARGE_SHARE_ALLOWANCE = 0.04
# A suspect explains an endpoint that is this much nearer to it than to the model.
NEARER = 0.3
MIN_POSITIONS = 4


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Cause:
    """What is probably wrong, on what evidence, and what to do."""

    what: str
    evidence: str
    remedy: str


@dataclass(slots=True)
class Verdict:
    checks: list[Check] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    """Of each prompt that is beyond the bounds, its first position that is."""
    expert: ExpertFinding | None = None

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


def judge(golden: Golden, measured: Measured) -> Verdict:
    """The verdict on one endpoint."""
    verdict = Verdict()
    if measured.refused:
        verdict.checks.append(Check("requests", False, "; ".join(measured.refused)))
    if measured.rendered:
        wrong = measured.mismatches
        detail = f"{measured.rendered - len(wrong)} of {measured.rendered} chats have the golden token ids"
        verdict.checks.append(Check("rendering and tokens", not wrong, detail))
        for mismatch in wrong[:3]:
            verdict.causes.append(Cause("prompt rendering", f"{mismatch.prompt}: {mismatch.message}", mismatch.remedy))
    bound = typical_bound(measured.positions)
    failed = []
    for kind, name in ((TEXT, "prompts: text"), (IMAGE, "prompts: images"), (ANSWER, "answers")):
        group = [position for position in measured.positions if position.kind == kind]
        if len(group) >= MIN_POSITIONS:
            check = _distributions(name, group, bound)
            verdict.checks.append(check)
            if not check.passed:
                failed.append(kind)
    verdict.expert = suspicious_expert(golden, measured.positions)
    if verdict.expert is not None:
        found = verdict.expert
        detail = (
            f"tokens of layer {found.layer}, expert {found.expert} are {found.ratio:.0f} times as far off as others"
        )
        verdict.checks.append(Check("experts", False, detail))
    if failed or verdict.expert is not None:
        verdict.causes += _locate(measured, verdict.expert, failed, bound)
        verdict.diverged = _first_divergences(golden, measured, bound)
    return verdict


def typical_bound(positions: list[Position]) -> float:
    """The largest median KL that rounding accounts for."""
    return max(TYPICAL_FACTOR * median(position.noise for position in positions), TYPICAL_FLOOR)


def large(bound: float) -> float:
    return max(LARGE_FACTOR / TYPICAL_FACTOR * bound, LARGE_FLOOR)


def _distributions(name: str, group: list[Position], bound: float) -> Check:
    typical = median(position.kl for position in group)
    # A kind of its own may be noisier than all together.
    bound = max(bound, typical_bound(group))
    share = share_above([position.kl for position in group], large(bound))
    twin = share_above([position.noise for position in group], large(bound))
    allowed = allowed_share(LARGE_SHARE_FACTOR * twin + LARGE_SHARE_ALLOWANCE, len(group))
    detail = (
        f"median KL {typical:.1e} (bound {bound:.1e}), mean {math.fsum(p.kl for p in group) / len(group):.1e}, above "
        f"{large(bound):.0e} at {share:.1%} of {len(group)} positions (bound {allowed:.1%})"
    )
    return Check(name, typical <= bound and share <= allowed, detail)


def _locate(measured: Measured, expert: ExpertFinding | None, failed: list[str], bound: float) -> list[Cause]:
    suspect = _nearest_suspect(measured)
    if suspect is not None:
        return [suspect]
    if expert is not None:
        return [
            Cause(
                f"routed expert {expert.expert} of layer {expert.layer}",
                f"{expert.tokens} positions whose token went there are {expert.ratio:.0f} times as far from the reference "
                f"as the others (rank test, {expert.score:.0f} standard deviations)",
                "check that expert's weights and scales: `k26 check`, then the file that holds it against its checksum",
            )
        ]
    if failed == [IMAGE]:
        what, remedy = "the image path", "check that the engine's image processor is the plugin's: `k26 doctor`"
        return [Cause(what, "text agrees, positions of images do not", remedy)]
    if failed == [ANSWER] and any(position.kind == TEXT for position in measured.positions):
        remedy = "try another attention backend, or --enforce-eager"
        return [Cause("decoding", "the prompts' positions agree, generated ones do not", remedy)]
    # A prompt's first token sees only itself: neither rotation nor attention scores can change it.
    first = [position.kl for position in measured.positions if position.index == 0]
    if first and median(first) <= bound:
        remedy = "check rope_scaling in config.json and the attention backend"
        return [Cause("positions or attention", "the first token of each prompt agrees, later ones do not", remedy)]
    remedy = "check the checkpoint (`k26 check`), then the experts backend: K26_EXPERTS=reference"
    return [Cause("weights of every token's path", "all positions are off, the first of each prompt too", remedy)]


def _nearest_suspect(measured: Measured) -> Cause | None:
    best: tuple[float, str, float] | None = None
    for name in {name for position in measured.positions for name in position.suspects}:
        both = [
            (position.suspects[name], position.kl)
            for position in measured.positions
            if not math.isnan(position.suspects.get(name, math.nan))
            # Where the mistake changes nothing there is nothing to tell apart.
            and (position.kind != TEXT or not BY_NAME[name].on_images_only)
        ]
        if len(both) < MIN_POSITIONS:
            continue
        near, far = median(pair[0] for pair in both), median(pair[1] for pair in both)
        if near <= NEARER * far and (best is None or near / far < best[0]):
            best = (near / far, name, near)
    if best is None:
        return None
    ratio, name, near = best
    suspect = BY_NAME[name]
    evidence = f"it answers as such a model does: median KL {near:.1e} from that, {near / ratio:.1e} from the right one"
    return Cause(suspect.meaning, evidence, suspect.remedy)


def _first_divergences(golden: Golden, measured: Measured, bound: float) -> list[str]:
    found: dict[int, Position] = {}
    for position in measured.positions:
        if position.kl > max(bound, TYPICAL_FACTOR * position.noise) and position.prompt not in found:
            found[position.prompt] = position
    return [
        f"{golden.prompts[number].name}: position {position.index} ({position.kind}), KL {position.kl:.1e}"
        for number, position in found.items()
    ]
