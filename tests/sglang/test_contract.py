"""Tests that our model class has what SGLang looks up on the model that it serves.

SGLang's in-tree class for this model lacks some of these attributes, and each release lacks others.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.contract import looked_up, members
from support.server import Server
from support.sglang_scripted import order
from support.sglang_server import first_tokens

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

NOT_GIVEN = {
    "capture_aux_hidden_states": "context parallelism alone takes it, and would run the decoder without the images",
    "pp_group": "as above: SGLang stops there, with this name",
    "model": "before 0.5.13 it says that prefill may be captured in graphs, which those releases do not do for this model",
}


def test_the_model_has_what_sglang_looks_up() -> None:
    import sglang.srt

    from k26_plugins.sglang import compat
    from k26_plugins.sglang.model import OF_LANGUAGE_MODEL, KimiK25ForConditionalGeneration

    found = looked_up(Path(next(iter(sglang.srt.__path__))), without=("models", "hardware_backend/mlx"))
    of_language_model = members(compat.language_model())
    assert {"generate_weight_name_filter", "lm_head", "packed_modules_mapping"} <= found.keys() & of_language_model
    ours = members(KimiK25ForConditionalGeneration) | OF_LANGUAGE_MODEL
    assert {name: found[name] for name in (found.keys() & of_language_model) - ours - NOT_GIVEN.keys()} == {}
    assert KimiK25ForConditionalGeneration.packed_modules_mapping is compat.language_model().packed_modules_mapping


def _noted(server: Server, beginning: str) -> str:
    return next(line for line in reversed(server.log.read_text().splitlines()) if beginning in line)


def test_its_answers_are_the_language_model_s(scripted_server: Server) -> None:
    order(scripted_server, "compare with the language model")
    assert _noted(scripted_server, "contract: ").endswith("contract: []")


def test_a_lost_expert_is_read_again_and_nothing_else(scripted_server: Server) -> None:
    """When SGLang loses a rank, it asks the model for a filter of weight names and reads the lost experts again. The
    test uses this filter alone, because the rest of what SGLang does then needs GPUs."""
    before = first_tokens(scripted_server)
    order(scripted_server, "one expert's scale doubled")
    assert first_tokens(scripted_server) != before
    order(scripted_server, "read an expert again")
    assert "(True, " in _noted(scripted_server, "read again: ")
    assert first_tokens(scripted_server) == [pytest.approx(entry) for entry in before]
