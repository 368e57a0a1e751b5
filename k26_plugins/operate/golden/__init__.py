"""Compute golden logits: the reference's answers on the real checkpoint, on one machine with little memory.

`k26 verify` compares a server with them.
"""

from k26_plugins.operate.golden.file import Golden, GoldenError, GoldenPrompt
from k26_plugins.operate.golden.job import GoldenJob
from k26_plugins.operate.golden.prompts import Prompt, PromptError, read_prompts, read_requests
from k26_plugins.operate.golden.state import StateError

__all__ = [
    "Golden",
    "GoldenError",
    "GoldenJob",
    "GoldenPrompt",
    "Prompt",
    "PromptError",
    "StateError",
    "read_prompts",
    "read_requests",
]
