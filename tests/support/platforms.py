"""Describes platforms that no test machine has, lists the flags that people give on them, and reads docs/platforms.md.

The tests settle an engine's configuration on each platform with each set of flags, and compare what the engine then
chooses with the tables of that page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

CPU = "CPU"
_NVIDIA: dict[str, Any] = {
    "is_cuda": True,
    "is_hip": False,
    "has_flashinfer": True,
    "has_amx": False,
    "is_sm90": False,
    "is_sm100": False,
    "is_sm100_or_sm110": False,
    "is_sm110": False,
    "is_sm120": False,
    "is_blackwell": False,
    "is_hopper_with_cuda_12_3": False,
}
_AMD = {**_NVIDIA, "is_cuda": False, "is_hip": True, "has_flashinfer": False}
_CPU = {**_AMD, "is_hip": False, "device_sm": 0, "device_capability": (0, 0)}
_DATACENTRE_BLACKWELL = {**_NVIDIA, "is_sm100": True, "is_sm100_or_sm110": True, "is_blackwell": True}
_SMALL_BLACKWELL = {**_NVIDIA, "is_sm120": True, "is_blackwell": True}


def _capability(facts: Mapping[str, Any], major: int, minor: int) -> dict[str, Any]:
    return {**facts, "device_sm": 10 * major + minor, "device_capability": (major, minor)}


SGLANG_PLATFORMS = {
    "sm_80": _capability(_NVIDIA, 8, 0),
    "sm_89": _capability(_NVIDIA, 8, 9),
    "sm_90": _capability({**_NVIDIA, "is_sm90": True, "is_hopper_with_cuda_12_3": True}, 9, 0),
    "sm_100": _capability(_DATACENTRE_BLACKWELL, 10, 0),
    "sm_103": _capability(_DATACENTRE_BLACKWELL, 10, 3),
    "sm_120": _capability(_SMALL_BLACKWELL, 12, 0),
    "sm_121": _capability(_SMALL_BLACKWELL, 12, 1),
    "gfx942": _capability(_AMD, 9, 4),
    "gfx950": _capability(_AMD, 9, 5),
    CPU: _CPU,
}
"""The facts that SGLang's `override_platform` is given for each platform."""

SGLANG_FLAGS = {
    "none": "",
    "runner triton": "--moe-runner-backend triton",
    "runner marlin": "--moe-runner-backend marlin",
    "runner flashinfer_trtllm": "--moe-runner-backend flashinfer_trtllm",
    "TP": "--tp 8",
    "EP": "--tp 8 --ep 8",
    "DP attention": "--tp 8 --dp 8 --enable-dp-attention",
    "DeepEP normal": "--tp 8 --moe-a2a-backend deepep --deepep-mode normal",
    "DeepEP low latency": "--tp 8 --moe-a2a-backend deepep --deepep-mode low_latency",
    "EPLB": "--tp 8 --ep 8 --enable-eplb",
    "Eagle3": "--speculative-algorithm EAGLE3 --speculative-draft-model-path DIR",
    "DCP": "--tp 8 --dcp-size 8",
    "encoder only": "--encoder-only",
    "fp8 KV": "--kv-cache-dtype fp8_e4m3",
    "parsers": "--reasoning-parser kimi_k2 --tool-call-parser kimi_k2",
    "hybrid": "--kt-weight-path DIR --kt-num-gpu-experts 4",
}

VLLM_FLAGS = {
    "none": "",
    "MoE triton": "--moe-backend triton",
    "MoE marlin": "--moe-backend marlin",
    "MoE flashinfer_trtllm": "VLLM_USE_FLASHINFER_MOE_INT4=1 --moe-backend flashinfer_trtllm",
    "MoE humming": "--moe-backend humming",
    "MoE emulation": "--moe-backend emulation",
    "MoE deep_gemm": "--moe-backend deep_gemm",
    "TP": "--tensor-parallel-size 8",
    "EP": "--tensor-parallel-size 8 --enable-expert-parallel",
    "DP": "--data-parallel-size 8",
    "DP and EP": "--data-parallel-size 8 --enable-expert-parallel",
    "DeepEP high throughput": (
        "--data-parallel-size 8 --enable-expert-parallel --all2all-backend deepep_high_throughput"
    ),
    "DeepEP low latency": "--data-parallel-size 8 --enable-expert-parallel --all2all-backend deepep_low_latency",
    "EPLB": "--tensor-parallel-size 8 --enable-expert-parallel --enable-eplb",
    "Eagle3": '--speculative-config {"method":"eagle3","model":"DRAFT","num_speculative_tokens":3}',
    "DCP": "--tensor-parallel-size 8 --decode-context-parallel-size 8",
    "encoder only": "--mm-encoder-only",
    "fp8 KV": "--kv-cache-dtype fp8",
}


def table(
    platforms: Iterable[str], flags: Iterable[str], cell: Callable[[str, str], str], title: str = ""
) -> list[str]:
    """Return the lines of a Markdown table with a column for each of `platforms` and a row for each of `flags`.

    cell: returns a cell's text, given its platform and its flags.
    """
    platforms = list(platforms)
    lines = [f"| {title} | ".replace("  ", " ") + " | ".join(platforms) + " |", "|---" * (len(platforms) + 1) + "|"]
    return [*lines, *("| " + " | ".join([name, *(cell(one, name) for one in platforms)]) + " |" for name in flags)]


def documented_table(section: str) -> list[str]:
    """Return the lines of the table in a section of docs/platforms.md."""
    text = (Path(__file__).parents[2] / "docs/platforms.md").read_text(encoding="utf-8")
    (part,) = (one for one in text.split("\n## ") if one.startswith(f"{section}\n"))
    return [line for line in part.splitlines() if line.startswith("|")]


def cells(lines: Iterable[str]) -> dict[tuple[str, str, str], str]:
    """Return the cells of Markdown tables by the table's first heading, the row's name and the column's name."""
    found: dict[tuple[str, str, str], str] = {}
    heading: list[str] = []
    lines = list(lines)
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        parts = [part.strip() for part in line.strip("|").split("|")]
        if below.startswith("|---"):
            heading = parts
        elif not line.startswith("|---"):
            found |= {(heading[0], parts[0], column): text for column, text in zip(heading[1:], parts[1:], strict=True)}
    return found
