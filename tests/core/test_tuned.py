"""Tests of which kernel serves according to an outcome of `k26 tune`, and of the file that holds it. The outcomes here
are invented."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from k26_plugins.common.experts.outcome import (
    OURS,
    Key,
    Outcome,
    OutcomeError,
    Timing,
    outcome_file,
    read_outcome,
    write_outcome,
)
from k26_plugins.common.experts.rule import choose
from k26_plugins.common.experts.tuned import find_outcome
from k26_plugins.common.purpose import Purpose

KEY = Key("Invented GPU", "570.1", "3.6.0", "2.11.0+cu128", "vllm 0.32.0", "7168x256x384")
SIZES = (1, 64, 4096)


def timed(kernel: str, *milliseconds: float, error: float = 2e-3) -> list[Timing]:
    """Return a kernel's times at each of SIZES."""
    return [Timing(kernel, "uniform", tokens, ms, error) for tokens, ms in zip(SIZES, milliseconds, strict=True)]


def winner(*timings: list[Timing], purpose: Purpose = Purpose.BOTH) -> str | None:
    return choose([timing for one in timings for timing in one], purpose).kernel


def test_the_faster_kernel_serves() -> None:
    assert winner(timed(OURS, 1, 1, 1), timed("marlin", 1.2, 1.2, 1.2)) == OURS
    assert winner(timed(OURS, 1.2, 1.2, 1.2), timed("marlin", 1, 1, 1)) == "marlin"


def test_a_win_of_less_than_three_percent_is_none() -> None:
    assert winner(timed(OURS, 0.98, 0.98, 0.98), timed("marlin", 1, 1, 1)) == "marlin"
    assert winner(timed(OURS, 0.96, 0.96, 0.96), timed("marlin", 1, 1, 1)) == OURS


def test_faster_but_less_exact_is_no_win() -> None:
    assert winner(timed(OURS, 0.5, 0.5, 0.5, error=4e-3), timed("marlin", 1, 1, 1)) == "marlin"
    # An error that is only slightly larger comes from roundings in another order.
    assert winner(timed(OURS, 0.5, 0.5, 0.5, error=2.1e-3), timed("marlin", 1, 1, 1)) == OURS


def test_a_small_error_does_not_excuse_a_loss() -> None:
    """Our kernel takes half the time at one size and twice the time at two. Its smaller error does not make up for the
    sizes at which it is slower."""
    assert winner(timed(OURS, 1, 4, 4, error=1e-3), timed("marlin", 2, 2, 2)) == "marlin"


@pytest.mark.parametrize("error", [0.3, math.inf])
def test_faster_but_wrong_is_not_taken(error: float) -> None:
    right = timed("marlin", 1, 1, 1)
    wrong_at_one = [*timed(OURS, 0.1, 0.1, 0.1)[:2], Timing(OURS, "uniform", SIZES[2], 0.1, error)]
    assert winner(wrong_at_one, right) == "marlin"
    assert winner(timed(OURS, 1, 1, 1), timed("marlin", 0.1, 0.1, 0.1, error=error)) == OURS
    assert winner(timed(OURS, 1, 1, 1, error=error), timed("marlin", 1, 1, 1, error=error)) is None


def test_what_did_not_run_everywhere_is_not_compared() -> None:
    marlin = [*timed("marlin", 1, 1, 1)[:2], Timing("marlin", "uniform", SIZES[2], note="out of memory")]
    assert winner(timed(OURS, 2, 2, 2), marlin, timed("triton", 3, 3, 3)) == OURS
    assert winner(timed(OURS, 2, 2, 2)[:2], timed("triton", 3, 3, 3)) == "triton"


def test_ours_is_held_to_the_fastest_of_the_engine() -> None:
    assert winner(timed(OURS, 2, 2, 2), timed("marlin", 3, 3, 3), timed("humming", 1, 1, 1)) == "humming"


def test_the_purpose_weighs_the_batches() -> None:
    ours, theirs = timed(OURS, 0.5, 0.5, 3), timed("marlin", 1, 1, 1)
    assert winner(ours, theirs, purpose=Purpose.DECODE) == OURS
    assert winner(ours, theirs, purpose=Purpose.PREFILL) == "marlin"
    # There are two sizes of decode and one of prefill, and each of the two kinds counts half.
    assert winner(ours, theirs, purpose=Purpose.BOTH) == "marlin"
    assert winner(timed(OURS, 0.5, 0.5, 1.8), theirs, purpose=Purpose.BOTH) == OURS
    assert choose([*ours[:2], *theirs[:2]], Purpose.PREFILL).kernel is None


def test_routings_of_one_size_share_its_weight() -> None:
    ours, theirs = timed(OURS, 0.8, 1, 1), timed("marlin", 1, 1, 1)
    skewed = [[Timing(kernel, "zipf", 1, ms, 2e-3)] for kernel, ms in ((OURS, 1.25), ("marlin", 1.0))]
    assert winner(ours[:1], theirs[:1], purpose=Purpose.DECODE) == OURS
    assert winner(ours[:1], theirs[:1], *skewed, purpose=Purpose.DECODE) == "marlin"


def outcome(milliseconds: float = 1.0) -> Outcome:
    note = Timing("humming", "uniform", 1, note="humming is not installed")
    wrong = Timing("marlin", "uniform", 1, 1.0, math.inf)
    tiles = {"16": {"BLOCK_SIZE_M": 16}}
    return Outcome(KEY, Purpose.DECODE, tiles, (*timed(OURS, milliseconds, 1, 1), wrong, note))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("K26_TUNED", raising=False)
    return tmp_path


def test_what_is_written_is_read(cache: Path) -> None:
    file = outcome_file(KEY)
    assert file.is_relative_to(cache / "k26-plugins")
    assert find_outcome(KEY)[0] is None
    write_outcome(outcome(), file)
    assert find_outcome(KEY) == (outcome(), str(file))


@pytest.mark.parametrize("field", ["gpu", "driver", "triton", "torch", "engine", "shape"], ids="other {}".format)
@pytest.mark.usefixtures("cache")
def test_another_key_is_another_measurement(field: str) -> None:
    """An outcome for another driver, for example, is not used, and a file that was renamed to the other key's name is
    found out."""
    write_outcome(outcome(), outcome_file(KEY))
    other = replace(KEY, **{field: "other"})
    assert outcome_file(other) != outcome_file(KEY)
    found, why = find_outcome(other)
    assert found is None
    assert "was not measured" in why
    outcome_file(KEY).rename(outcome_file(other))
    found, why = find_outcome(other)
    assert found is None
    assert f"{field} {getattr(KEY, field)} instead of other" in why


DAMAGED = {
    "half of it": lambda text: text[: len(text) // 2],
    "nothing": lambda text: "",
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "a list": lambda text: "[]",
    "no purpose": lambda text: text.replace("decode", "everything"),
    "a field too many": lambda text: text.replace('"driver"', '"drivers": "", "driver"'),
    "a time of nothing": lambda text: text.replace('"milliseconds": 1', '"milliseconds": 0'),
    "a word for a number": lambda text: text.replace('"tokens": 64', '"tokens": "many"'),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_as_none(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file in the cache counts as none. A damaged file that the user gave is an error, which names it."""
    file = outcome_file(KEY)
    write_outcome(outcome(), file)
    text = file.read_text()
    file.write_text(DAMAGED[name](text))
    assert file.read_text() != text
    found, why = find_outcome(KEY)
    assert found is None
    assert str(file) in why
    monkeypatch.setenv("K26_TUNED", str(file))
    with pytest.raises(OutcomeError, match="run `k26 tune` again"):
        find_outcome(KEY)


def test_one_given_by_hand(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the user gave counts for another driver too, which is said, and not for another GPU or shape."""
    write_outcome(outcome(9.0), outcome_file(KEY))
    given = cache / "given.json"
    monkeypatch.setenv("K26_TUNED", str(given))
    with pytest.raises(
        ValueError, match=r"K26_TUNED is '.*given.json': choose an existing file of `k26 tune`, or unset it"
    ):
        find_outcome(KEY)
    write_outcome(outcome(), given)
    assert find_outcome(KEY)[0] == outcome()
    found, why = find_outcome(replace(KEY, driver="580.2"))
    assert found == outcome()
    assert why == f"K26_TUNED={given}, though here is driver 580.2 instead of 570.1"
    for other in (replace(KEY, gpu="Another GPU"), replace(KEY, shape="7168x2048x48")):
        found, why = find_outcome(other)
        assert found is None
        assert f"was measured for 7168x256x384 on Invented GPU, this is {other.shape} on {other.gpu}" in why


def test_a_folder_that_cannot_be_written(cache: Path) -> None:
    """A file lies in the place of the folder, since root may write to any folder."""
    (cache / "k26-plugins").write_text("")
    with pytest.raises(OSError, match="k26-plugins"):
        write_outcome(outcome(), outcome_file(KEY))
    assert find_outcome(KEY)[0] is None


def write_often(mine: Outcome, file: Path) -> None:
    for _ in range(200):
        write_outcome(mine, file)
        read_outcome(file)


@pytest.mark.usefixtures("cache")
def test_two_that_write_at_once() -> None:
    """No process ever reads half a file. The file that was written last stays, and no other file is left beside it."""
    file = outcome_file(KEY)
    both = [replace(outcome(), timings=outcome().timings * times) for times in (1, 40)]
    write_outcome(both[0], file)
    processes = multiprocessing.get_context("fork")
    writers = [processes.Process(target=write_often, args=(one, file)) for one in both]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(len(read_outcome(file).timings))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen == {len(one.timings) for one in both}
    assert read_outcome(file) in both
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.usefixtures("cache")
def test_the_file_is_plain_json() -> None:
    file = outcome_file(KEY)
    write_outcome(outcome(), file)
    content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["key"]["driver"] == "570.1"
    assert content["timings"][3]["error"] is None
