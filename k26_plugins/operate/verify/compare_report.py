"""Show comparisons of endpoints as text, as JSON, and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import Any

from k26_plugins import __version__
from k26_plugins.operate.verify.compare import Pair
from k26_plugins.operate.verify.endpoint import Endpoint
from k26_plugins.operate.verify.page import Section, check_lines, page, shares_below


def as_text(pairs: Sequence[Pair], endpoints: Sequence[Endpoint]) -> str:
    """Return the comparisons as text for a terminal."""
    lines = []
    for pair in pairs:
        lines += [f"{_verdict(pair)}  {_names(pair, endpoints)}", *check_lines(pair.checks)]
        lines += [f"  {note}" for note in _notes(pair)]
    return "\n".join(lines)


def as_json(pairs: Sequence[Pair], endpoints: Sequence[Endpoint]) -> list[dict[str, Any]]:
    """Return an object for each pair, of values that `json.dumps` takes."""
    return [
        {
            "k26_plugins": __version__,
            "urls": [endpoints[index].url for index in (pair.first, pair.second)],
            "engines": [endpoints[index].engine for index in (pair.first, pair.second)],
            "agree": pair.agree,
            "checks": [asdict(check) for check in pair.checks],
            "differently_rendered": pair.differently_rendered,
            "groups": {
                name: {"positions": len(group), "median_kl": median(group), "mean_kl": mean(group)}
                for name, group in pair.groups.items()
            },
            "answers_part": pair.parted,
            "not_shown": pair.not_shown,
        }
        for pair in pairs
    ]


def as_html(pairs: Sequence[Pair], endpoints: Sequence[Endpoint]) -> str:
    """Return the comparisons as an HTML page that needs no other file.

    Raises ImportError without matplotlib: `pip install 'k26-plugins[report]'`.
    """
    agree = all(pair.agree for pair in pairs)
    asked = ", ".join(f"{endpoint.engine} ({endpoint.url})" for endpoint in endpoints)
    sections = [
        Section(pair.checks, [_notes(pair)], heading=f"{_verdict(pair)}: {_names(pair, endpoints)}") for pair in pairs
    ]
    curves = [
        (f"{endpoints[pair.first].url} and {endpoints[pair.second].url}: {name}", group, None)
        for pair in pairs
        for name, group in pair.groups.items()
    ]
    heading = "The endpoints agree" if agree else "The endpoints do not agree"
    return page("k26 compare", heading, asked, sections, [shares_below(curves, "one another")])


def _verdict(pair: Pair) -> str:
    return "agree" if pair.agree else "DIFFER"


def _names(pair: Pair, endpoints: Sequence[Endpoint]) -> str:
    return " and ".join(f"{endpoints[index].engine} ({endpoints[index].url})" for index in (pair.first, pair.second))


def _notes(pair: Pair) -> list[str]:
    return [*(f"answers part: {line}" for line in pair.parted), *(f"not shown: {line}" for line in pair.not_shown)]
