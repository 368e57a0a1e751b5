"""Tests of loading by SGLang's own functions, through ours.

They cover the memory that loading takes, files that change meanwhile, a checkpoint of as many tensors as the published
one, and saved states.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from support.full_count import FullCountTests
from support.load_checks import LoadTests
from support.saved_state import SavedStateTests
from support.server import Server
from support.sglang_server import EAGER, generate, rows, serve

pytestmark = pytest.mark.long


class TestLoads(LoadTests):
    pass


class TestFullCount(FullCountTests):
    def serve(self, folder: Path, log: Path) -> AbstractContextManager[Server]:
        return serve(folder, log, **EAGER)

    def logprobs(self, server: Server, prompt: list[int]) -> torch.Tensor:
        return rows(generate(server, prompt, 1)["meta_info"]["input_top_logprobs"][1:])


class TestSavedStates(SavedStateTests):
    pass
