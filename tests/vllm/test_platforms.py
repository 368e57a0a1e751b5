"""Tests of what vLLM would run on platforms other than this machine, with the plugin and without.

In processes that take themselves for such a platform (support/vllm_platforms.py) vLLM settles its command line, chooses
among its classes and builds the model in three ways: alone, with the plugin, and with the core's kernels asked for by
name. Any difference beyond those that docs/platforms.md names is a fault.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.platforms import CPU, VLLM_FLAGS, cells, documented_table, table
from support.published_sizes import make_eagle3_draft, make_published_sizes
from support.server import python_path
from support.vllm_platforms import KERNEL_FLAGS

KINDS = (
    ("sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"),
    ("gfx942", "gfx950"),
    (CPU,),
)
"""The platforms of the tables, by kind; one run of support/vllm_platforms.py takes all platforms of a kind in turn."""
SOME = (("sm_100",),), ("none", "DeepEP low latency", "EPLB", "encoder only")
"""The platforms and flags for which CI has time."""

ATTENTION_FLAGS = ("none", "fp8 KV", "DCP")
"""The flags with rows in the table of attention backends; no other flags change the choice of these backends."""

WRITTEN = {
    "model_config.tokenizer_mode",
    "model_config.hf_config.text_config.moe_router_dtype",
    "model_config.hf_text_config.moe_router_dtype",
}
"""What the plugin writes into vLLM's configuration on every platform."""

REFUSALS = {
    "not this device": ("since kernel does not support current device", "since Marlin not supported for this layer"),
    "not for INT4": ("is not supported for WNA16 MoE",),
    "no INT4 experts": ("No WNA16 MoE backend supports the deployment configuration",),
    "no EPLB": ("EPLB is not supported CompressedTensorsWNA16MoEMethod",),
    "no EPLB here": ("Expert parallelism load balancing is only supported on CUDA devices",),
    "no fp8 KV": ("FP8 KV cache is not supported by the Triton MLA backend",),
    "no DeepEP": ("name 'DeepEPHTPrepareAndFinalize' is not defined",),
    "not the core's": ("K26_EXPERTS=triton cannot serve here",),
}
"""What the tables say about a refused start, with parts of the error by which the refusal is known."""

Answers = dict[tuple[str, str], dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.long)])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Return what vLLM chose in each way to run, by platform and flags."""
    folder = tmp_path_factory.mktemp("published")
    make_published_sizes(folder / "model")
    make_eagle3_draft(folder / "draft")
    kinds, flags = SOME if request.param == "some" else (KINDS, tuple(VLLM_FLAGS))
    found: Answers = {}
    for platforms in kinds:
        for line in _run(folder, ",".join(platforms), *flags):
            found.setdefault((line.pop("platform"), line.pop("flags")), {})[line.pop("way")] = line
    assert len(found) == sum(map(len, kinds)) * len(flags)
    return found


def _run(folder: Path, *arguments: str) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", "support.vllm_platforms", str(folder / "model"), str(folder / "draft"), *arguments]
    environment = {**os.environ, "PYTHONPATH": python_path(), "VLLM_CONFIGURE_LOGGING": "0"}
    environment["VLLM_CACHE_ROOT"] = str(folder / "cache")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def test_vllm_chooses_as_it_does_alone(answers: Answers) -> None:
    """On GPUs vLLM with the plugin has every class of the model, every backend and every field of the configuration as
    alone, except for the class of the whole model and the fields in `WRITTEN`."""
    started = 0
    for place, ways in answers.items():
        alone, ours = dict(ways["alone"]), dict(ways["plugin"])
        if place[0] == CPU:
            continue
        if "refused" in alone:
            assert ours == alone, place
            continue
        started += 1
        assert alone.pop("model") == "vllm.model_executor.models.kimi_k25"
        assert ours.pop("model") == "k26_plugins.vllm.model"
        settled, by_us = alone.pop("settled"), ours.pop("settled")
        different = {name for name in settled | by_us if settled.get(name) != by_us.get(name)}
        # The speculative configuration contains the target's, and the draft's, which takes the target's tokenizer.
        assert {re.sub("^speculative_config.(target|draft)_", "", name) for name in different} == WRITTEN, place
        assert ours == alone, place
    assert started >= len(answers) // 2 or all(platform == CPU for platform, _ in answers)


def test_the_documented_tables_are_what_vllm_chooses(answers: Answers) -> None:
    documented = cells(documented_table("vLLM"))
    found = cells(tables(answers))
    assert found.items() <= documented.items()
    if len({platform for platform, _ in answers}) == sum(map(len, KINDS)):
        assert documented_table("vLLM") == tables(answers), "\n".join(tables(answers))


def tables(answers: Answers) -> list[str]:
    """Return the lines of the document's tables, for the platforms and the flags that were run."""
    platforms = list(dict.fromkeys(platform for platform, _ in answers))
    flags = list(dict.fromkeys(name for _, name in answers))

    def experts(platform: str, name: str) -> str:
        return _changed(*(_experts(answers[platform, name][way]) for way in ("alone", "plugin")))

    def attention(platform: str, name: str) -> str:
        return _changed(*(_attention(answers[platform, name][way]) for way in ("alone", "plugin")))

    def kernels(platform: str, name: str) -> str:
        return _experts(answers[platform, name]["triton"])

    return [
        *table(platforms, flags, experts, "experts"),
        *table(platforms, [name for name in ATTENTION_FLAGS if name in flags], attention, "attention"),
        *table(platforms, [name for name in KERNEL_FLAGS if name in flags], kernels, "K26_EXPERTS=triton"),
        *table(["words"], REFUSALS, lambda _, why: "; ".join(f"`{words}`" for words in REFUSALS[why]), "refused"),
    ]


def _changed(alone: str, ours: str) -> str:
    return alone if alone == ours else f"{alone} → {ours}"


def _experts(found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"refused: {_why(found['refused'])}"
    name: str = found.get("experts", "no experts")
    return "core" if name.startswith("K26ExpertsMethod") else name.replace("Experts", "")


def _attention(found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"refused: {_why(found['refused'])}"
    return ", ".join(found[part] for part in ("attention", "prefill", "vision attention"))


def _why(words: str) -> str:
    (found,) = (why for why, known in REFUSALS.items() if any(part in words for part in known))
    return found
