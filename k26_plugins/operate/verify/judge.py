"""Judge from the measured distances whether an endpoint is right, and what is probably wrong if it is not.

Rounding sets the bounds: at each position the golden file has the distance of the bf16 baseline, the reference in
bfloat16, from the reference in float32. An engine rounds at other points of its computation, so its bound is a few
times that distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from k26_plugins.operate.golden import Golden
from k26_plugins.operate.golden.variants import BY_NAME
from k26_plugins.operate.verify.distance import allowed_share, share_above
from k26_plugins.operate.verify.localize import (
    BIAS_HIGH,
    BIAS_LOW,
    EITHER,
    EXPERT,
    MIN_SCORE,
    ROTATION,
    Localizer,
    Place,
)
from k26_plugins.operate.verify.measure import ANSWER, IMAGE, TEXT, Measured, Position

# The median distance may be this many times the bf16 baseline's. On CPUs and the tiny checkpoint vLLM 0.32.0 is at 0.9
# (text), 1.5 (images) and 1.0 (answers) times the baseline's, SGLang 0.5.23 at 0.7, 0.6 and 0.8; the mildest seeded
# fault, YaRN's factor halved, is above 10.
TYPICAL_FACTOR = 4.0
TYPICAL_FLOOR = 2e-5
# Bounds for positions far beyond rounding, as those are whose token was sent to other experts by rounding. Engines have
# about as many of them as the baseline has.
LARGE_FACTOR = 100.0
LARGE_FLOOR = 1e-2
LARGE_SHARE_FACTOR = 3.0
LARGE_SHARE_ALLOWANCE = 0.04
# A suspect explains an endpoint whose distance to the suspect is at most this share of its distance to the model.
NEARER = 0.3
# A suspect is named alone if the endpoint is nearer to it than to every other suspect that explains the endpoint, by
# more than this many standard deviations of a sign test.
SUSPECT_STANDS_OUT = 3.0
MIN_POSITIONS = 4


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked, and whether it is right."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Cause:
    """A probable cause: what is wrong, the evidence for it, and the remedy."""

    what: str
    evidence: str
    remedy: str


@dataclass(slots=True)
class Verdict:
    """The checks of one endpoint, and what is probably wrong if one of them failed."""

    checks: list[Check] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    """For each prompt with positions beyond the bounds, the first such position in words."""
    places: list[Place] = field(default_factory=list)
    """Places where a fault may sit, the likeliest first. The endpoint has a fault if any of them is `found`."""
    smallest: str = ""
    """How small a fault these prompts would show, in words."""

    @property
    def passed(self) -> bool:
        """Whether there are checks, and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def judge(golden: Golden, measured: Measured) -> Verdict:
    """Return the verdict on one endpoint. golden: the file that the endpoint was measured with."""
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
    localizer = Localizer(golden, measured.positions)
    verdict.places = localizer.places
    verdict.smallest = (
        f"every position {bound / typical_noise(measured.positions):.0f} times as far off as rounding makes it; "
        f"{localizer.sensitivity()}"
    )
    if verdict.places:
        score, found = verdict.places[0].score, any(place.found for place in verdict.places)
        detail = f"the most that tokens of one expert, of one bias or late in a prompt stand out is {score:.1f} σ"
        verdict.checks.append(Check("no place stands out", not found, f"{detail} (bound {MIN_SCORE:.0f})"))
    if failed or any(place.found for place in verdict.places):
        verdict.causes += _locate(measured, localizer, failed, bound)
        verdict.diverged = _first_divergences(golden, measured, bound)
    return verdict


def typical_noise(positions: list[Position]) -> float:
    """Return the median KL that rounding alone makes at these positions."""
    return max(median(position.noise for position in positions), 1e-12)


def typical_bound(positions: list[Position]) -> float:
    """Return the largest median KL that rounding accounts for at these positions."""
    return max(TYPICAL_FACTOR * typical_noise(positions), TYPICAL_FLOOR)


def large(bound: float) -> float:
    """Return the KL above which a position is far beyond rounding. bound: as `typical_bound` returns it."""
    return max(LARGE_FACTOR / TYPICAL_FACTOR * bound, LARGE_FLOOR)


def _distributions(name: str, group: list[Position], bound: float) -> Check:
    typical = median(position.kl for position in group)
    # Positions of one kind may be noisier than all positions together.
    bound = max(bound, typical_bound(group))
    share = share_above([position.kl for position in group], large(bound))
    baseline = share_above([position.noise for position in group], large(bound))
    allowed = allowed_share(LARGE_SHARE_FACTOR * baseline + LARGE_SHARE_ALLOWANCE, len(group))
    detail = (
        f"median KL {typical:.1e} (bound {bound:.1e}), mean {math.fsum(p.kl for p in group) / len(group):.1e}, above "
        f"{large(bound):.0e} at {share:.1%} of {len(group)} positions (bound {allowed:.1%})"
    )
    return Check(name, typical <= bound and share <= allowed, detail)


def _locate(measured: Measured, localizer: Localizer, failed: list[str], bound: float) -> list[Cause]:
    """Return a list of one: the most probable cause, or "cannot tell" with the places that explain the fault alike."""
    suspect = _nearest_suspect(measured)
    if suspect is not None:
        return [suspect]
    place = localizer.named()
    if place is not None:
        return [Cause(place.what, _evidence(place), _PLACE_REMEDIES[place.kind])]
    found = [place for place in localizer.places if place.found]
    if found and (localizer.spares_most or not failed):
        evidence = "; ".join(f"{place.what}: {place.score:.1f} σ" for place in localizer.places[:3])
        remedy = "more and longer prompts tell them apart; `k26 check` and K26_EXPERTS=reference rule some of them out"
        return [Cause("cannot tell", f"several places explain it about equally well: {evidence}", remedy)]
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


_PLACE_REMEDIES = {
    EXPERT: "check that expert's weights and scales: `k26 check`, then the file that holds it against its checksum",
    EITHER: "check that expert's weights and scales, and e_score_correction_bias: `k26 check`, then the file's checksum",
    BIAS_HIGH: "check that e_score_correction_bias is loaded as it is stored, and in float32",
    BIAS_LOW: "check that e_score_correction_bias is loaded as it is stored, and in float32",
    ROTATION: "check rope_theta and rope_scaling in config.json, and the attention backend",
}


def _evidence(place: Place) -> str:
    whose = {
        EXPERT: "whose token went there",
        EITHER: "whose token went there",
        BIAS_HIGH: "whose token almost went there",
        BIAS_LOW: "whose token almost did not go there",
        ROTATION: "in the later half of a prompt",
    }[place.kind]
    return (
        f"{place.tokens} positions {whose} are {place.ratio:.1f} times as far off as the others, beside what rounding makes "
        f"there (rank test, {place.score:.0f} standard deviations)"
    )


def _nearest_suspect(measured: Measured) -> Cause | None:
    """Return as a cause the suspect that explains the endpoint's answers best; None if no suspect explains them.

    If other suspects explain them about as well, the cause is "cannot tell" and names all of these.
    """
    found: list[tuple[float, str, float]] = []
    for name in {name for position in measured.positions for name in position.suspects}:
        both = [(position.suspects[name], position.kl) for position in _told_apart(measured, name)]
        if len(both) >= MIN_POSITIONS:
            near, far = median(pair[0] for pair in both), median(pair[1] for pair in both)
            if near <= NEARER * far:
                found.append((near / far, name, near))
    if not found:
        return None
    found.sort()
    ratio, name, near = found[0]
    suspect = BY_NAME[name]
    evidence = f"it answers as such a model does: median KL {near:.1e} from that, {near / ratio:.1e} from the right one"
    rivals = [BY_NAME[other].meaning for _, other, _ in found[1:] if not _is_nearer(measured, name, other)]
    if rivals:
        return Cause("cannot tell", f"{evidence}: {' or '.join([suspect.meaning, *rivals])}", suspect.remedy)
    return Cause(suspect.meaning, evidence, suspect.remedy)


def _told_apart(measured: Measured, name: str) -> list[Position]:
    """Return the positions for which the suspect's distance is known and at which it can differ from the model."""
    return [
        position
        for position in measured.positions
        if not math.isnan(position.suspects.get(name, math.nan))
        and (position.kind != TEXT or not BY_NAME[name].on_images_only)
    ]


def _is_nearer(measured: Measured, name: str, other: str) -> bool:
    """Return whether the endpoint is nearer to suspect `name` than to `other` at more positions than by chance."""
    both = [position.suspects for position in _told_apart(measured, name) if other in position.suspects]
    nearer = sum(suspects[name] < suspects[other] for suspects in both)
    return 2 * nearer - len(both) > SUSPECT_STANDS_OUT * math.sqrt(len(both))


def _first_divergences(golden: Golden, measured: Measured, bound: float) -> list[str]:
    """Return in words the first position beyond the bounds of each prompt that has one."""
    found: dict[int, Position] = {}
    for position in measured.positions:
        if position.kl > max(bound, TYPICAL_FACTOR * position.noise) and position.prompt not in found:
            found[position.prompt] = position
    return [
        f"{golden.prompts[number].name}: position {position.index} ({position.kind}), KL {position.kl:.1e}"
        for number, position in found.items()
    ]
