"""Tests of loading by vLLM's own functions, through ours.

They cover the memory that loading takes, files that change meanwhile, a checkpoint of as many tensors as the published
one, and saved states.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from support.agreement import VOCABULARY, rows
from support.full_count import FullCountTests
from support.load_checks import LoadTests
from support.saved_state import SavedStateTests
from support.server import Server
from support.vllm_server import serve

pytestmark = pytest.mark.long


class TestLoads(LoadTests):
    pass


class TestFullCount(FullCountTests):
    def serve(self, folder: Path, log: Path) -> AbstractContextManager[Server]:
        return serve(folder, log, "--enforce-eager")

    def logprobs(self, server: Server, prompt: list[int]) -> torch.Tensor:
        answer = server.complete(prompt, max_tokens=1, prompt_logprobs=VOCABULARY)
        return rows(answer["choices"][0]["prompt_logprobs"][1:])


class TestSavedStates(SavedStateTests):
    pass
