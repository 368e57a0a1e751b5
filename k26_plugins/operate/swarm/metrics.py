"""Read from the engine's own counters which share of the prompt tokens it found in its prefix cache."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

# For each engine its counters of tokens looked up and of tokens found: vLLM's, then SGLang's, which need
# --enable-metrics.
_COUNTERS = (
    ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
    ("sglang:prompt_tokens_total", "sglang:cached_tokens_total"),
)


@dataclass(frozen=True)
class PrefixCache:
    """The counters of the prefix cache since the server started, in tokens."""

    asked: float
    """Tokens that were looked up."""
    found: float
    """Tokens that were found."""


async def read_prefix_cache(http: httpx.AsyncClient, url: str) -> PrefixCache | None:
    """Return the counters that the server's /metrics shows, or None if it has no such metrics."""
    try:
        response = await http.get(f"{url}/metrics", follow_redirects=True)
    except httpx.HTTPError:
        return None
    if response.status_code != 200:
        return None
    sums: defaultdict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                sums[sample.name] += sample.value
    except ValueError:
        return None
    for asked, found in _COUNTERS:
        if asked in sums:
            return PrefixCache(sums[asked], sums[found])
    return None


def hit_rate(before: PrefixCache | None, after: PrefixCache | None) -> float | None:
    """Return the share of the tokens looked up between two readings that was found.

    Returns None if a reading is missing or no token was looked up.
    """
    if before is None or after is None or after.asked <= before.asked:
        return None
    return (after.found - before.found) / (after.asked - before.asked)
