"""Every published KV cache size of this architecture that was found together with all settings of its run.

Some runs are left out, because a setting is not stated or cannot be planned: Kimi-K2.5 on the same eight RTX PRO 6000
at 0.93 (rounded figures, no number of requests), runs with a draft model, and runs of SGLang, of which only rounded
figures were found.
"""

from __future__ import annotations

from typing import NamedTuple


class Run(NamedTuple):
    """The settings of a published run, and the size of its KV cache."""

    gpus: str
    tp: int
    context_parallel: int
    kv_dtype: str
    memory_fraction: float
    sequences: int
    """`--max-num-seqs`, or vLLM's default for these GPUs if the run did not set it."""
    kv_tokens: int
    """`GPU KV cache size` in the log, in tokens."""
    source: str
    link: str
    """Empty if the source is not a public page."""


H200 = ("S-gonka's log, K2.6", "")
_RTX = "https://github.com/voipmonitor/rtx6kpro/blob/main/models"
RTX = ("voipmonitor/rtx6kpro, kimi-k26.md", f"{_RTX}/kimi-k26.md")
# Runs with the same settings in an earlier build of the engine.
EARLIER = ("voipmonitor/rtx6kpro, kimi-k26-mtp-long-ctx-wip", f"{_RTX}/kimi-k26-mtp-long-ctx-wip/README.md")
THINKING = (
    "vllm-project/recipes, Kimi-K2-Think.md (no vision tower)",
    "https://github.com/vllm-project/recipes/pull/115",
)
RUNS = (
    Run("8xH200", 8, 1, "bf16", 0.90, 1024, 711_296, *H200),
    Run("8xH200", 8, 1, "bf16", 0.90, 1024, 715_072, *THINKING),
    Run("8xH200", 8, 8, "bf16", 0.90, 1024, 5_721_088, *THINKING),
    Run("8xRTXPRO6000", 8, 1, "fp8", 0.94, 128, 437_264, *RTX),
    Run("8xRTXPRO6000", 8, 4, "fp8", 0.94, 128, 1_686_656, *RTX),
    Run("8xRTXPRO6000", 8, 8, "fp8", 0.94, 128, 3_267_968, *RTX),
    Run("16xRTXPRO6000", 16, 1, "fp8", 0.94, 128, 1_507_120, *RTX),
    Run("8xRTXPRO6000", 8, 1, "fp8", 0.94, 128, 437_520, *EARLIER),
    Run("8xRTXPRO6000", 8, 8, "fp8", 0.94, 128, 3_424_256, *EARLIER),
)
