"""Tests of what a draft model reads of the model in SGLang's real server, against the reference.

SGLang decodes speculatively on GPUs alone.
"""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.hidden_states import LAYERS_READ, assert_read_in_front_of, make_with_draft
from support.sglang_server import EAGER, serve

from k26_plugins.common.checkpoint import Checkpoint
from k26_plugins.common.reference.kimi_k26 import KimiK26

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_with_draft(tmp_path_factory.mktemp("speculation"))


@pytest.mark.skipif(
    find_spec("sglang.srt.layers.aux_hidden_states") is None, reason="this SGLang returns no draft's hidden states"
)
def test_a_draft_reads_the_layers_that_it_asks_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """SGLang returns the hidden states that it would give a draft, in the place of those of the last layer, and they
    are the reference's."""
    arguments = ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
    arguments += ["--return-aux-hidden-state-layer-ids", *map(str, LAYERS_READ)]
    token_ids = [random.Random(9).randrange(256) for _ in range(100)]
    with serve(folders[0], tmp_path / "log", *arguments, **EAGER) as server:
        sampling = {"max_new_tokens": 2, "temperature": 0}
        answer = server.post("/generate", input_ids=token_ids, sampling_params=sampling, return_hidden_states=True)
        assert answer.status_code == 200, answer.text
        of_prompt, *_ = answer.json()["meta_info"]["hidden_states"]
    read = torch.tensor(of_prompt)
    assert_read_in_front_of(LAYERS_READ, read, KimiK26(Checkpoint(folders[0]), torch.float32), token_ids)
