"""Tests that every name of an engine that the adapters touch is in their tables, and in the releases that the tables
say.

The judge is the files of every release in the checked ranges, whose snapshots ci/engine_names.py makes. Whether that
script reads a release rightly is tested where an engine is installed, by asking the engine itself:
tests/vllm/adapter/test_names.py and tests/sglang/adapter/test_names.py.
"""

from __future__ import annotations

import pytest
from engine_names import (
    ENGINES,
    GONE,
    changes,
    key,
    not_in_table,
    not_touched,
    overridden_not_in_table,
    read_snapshot,
    table,
    touched,
)
from support.versions import ABSENT, documented_rows, release_rows

CHECKED = {
    "vllm": ("0.19.1", "0.33.0"),
    "sglang": ("0.5.10", "0.5.23"),
    "sglang-kt": ("0.7.2", "0.7.2"),
    "kt-kernel": ("0.6.1", "0.7.2"),
}
RELEASES = [(engine, release) for engine in ENGINES for release in read_snapshot(engine)]


@pytest.mark.parametrize("adapter", ABSENT)
def test_the_table_is_what_the_source_touches(adapter: str) -> None:
    """Whatever the source looks up, patches, imports or derives from has an entry, and no entry is left over."""
    assert not_in_table(adapter) == set()
    assert overridden_not_in_table(adapter) == set()
    assert not_touched(adapter) == set()
    entries = [key(name) for name in table(adapter).values()]
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize(("engine", "release"), RELEASES)
def test_a_release_has_what_the_table_says(engine: str, release: str) -> None:
    """`since` and `until` bound the releases that have a name. They say nothing about a fork unless they name it."""
    snapshot = read_snapshot(engine)
    order = list(snapshot)
    is_fork = engine != next(one for one, adapter in ENGINES.items() if adapter == ENGINES[engine])
    wrong = {}
    for constant, name in table(ENGINES[engine]).items():
        since, until = name.since or order[0], name.until or order[-1]
        is_there = snapshot[release][key(name)] != GONE
        if since.rpartition(" ")[0]:
            told = f"{engine} {release}" == since
        elif is_fork:
            continue
        else:
            told = order.index(since) <= order.index(release) <= order.index(until)
        if is_there != told:
            wrong[constant] = is_there
    assert wrong == {}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_snapshot_has_every_name_and_release(engine: str) -> None:
    """Where this fails, run `python ci/engine_names.py` with the releases of docs/versions.md."""
    snapshot = read_snapshot(engine)
    assert (next(iter(snapshot)), next(reversed(snapshot))) == CHECKED[engine]
    names, overridden = touched(ENGINES[engine])
    assert names <= snapshot[CHECKED[engine][1]].keys() <= names | overridden


@pytest.mark.parametrize("package", ABSENT)
def test_a_name_that_a_release_lacks_has_something_in_its_place(package: str) -> None:
    """Each name that a release lacks is listed in `ABSENT`, where the adapter's author says what happens without it,
    and `ABSENT` lists no other name."""
    absent = {name for found in _releases(package) for name, what in found.items() if what == GONE}
    assert {name for name in absent if not name.startswith(tuple(ABSENT[package]))} == set()
    assert {one for one in ABSENT[package] if not any(name.startswith(one) for name in absent)} == set()


@pytest.mark.parametrize("package", ABSENT)
def test_every_name_is_somewhere(package: str) -> None:
    """A name that no release has is a mistake of ours, because a hook for it would never be put anywhere."""
    releases = _releases(package)
    found = {name for release in releases for name, what in release.items() if what != GONE}
    assert {name for release in releases for name in release} == found


def _releases(package: str) -> list[dict[str, str]]:
    snapshots = [read_snapshot(engine) for engine, its in ENGINES.items() if its == package]
    return [release for snapshot in snapshots for release in snapshot.values()]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_documents_list_the_releases(engine: str) -> None:
    assert documented_rows(engine) == release_rows(engine)


def test_changes_are_told_release_by_release() -> None:
    told = list(changes("vllm"))
    assert told[0] == "0.19.1: 0 changes"
    assert any(line.startswith("  vllm.parser.kimi_k2: -  ->  module") for line in told)
