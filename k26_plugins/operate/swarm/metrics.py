"""The share of prompt tokens that the engine found in its prefix cache, by its own counters."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

# Tokens asked for and tokens found, by engine: vLLM's, then SGLang's (with --enable-metrics).
_COUNTERS = (
    ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
    ("sglang:prompt_tokens_total", "sglang:cached_tokens_total"),
)


@dataclass(frozen=True)
class PrefixCache:
    """Counters since the server started, in tokens."""

    asked: float
    found: float


async def read_prefix_cache(http: httpx.AsyncClient, url: str) -> PrefixCache | None:
    """None where the server has no such metrics."""
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
    """The share of the tokens asked for between two readings that was found; None where it cannot be told."""
    if before is None or after is None or after.asked <= before.asked:
        return None
    return (after.found - before.found) / (after.asked - before.asked)
