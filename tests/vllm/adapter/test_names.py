"""Tests of the names that the adapter looks up in vLLM: which this release has, and what serves if one is gone."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from engine_names import read_snapshot
from support.versions import wrong_entries

from k26_plugins.common.adapters.engine import EngineName, UnsupportedEngineError
from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.vllm import compat, probe, register


def test_the_snapshot_says_what_this_release_has() -> None:
    """The snapshot was made by reading the release's files; here the engine itself is asked."""
    snapshot = read_snapshot("vllm")[compat.vllm_version().split("+")[0]]
    assert wrong_entries(snapshot) == {}


def test_a_name_that_vllm_lost_is_one_clear_error() -> None:
    name = EngineName("vllm.nothing", "Here", why="test it", remove_when="never")
    with pytest.raises(UnsupportedEngineError, match=r"vLLM .* has no vllm.nothing.Here.*checked on vLLM"):
        compat.private(name)
    with pytest.raises(UnsupportedEngineError, match="which k26-plugins needs to test it:"):
        compat.private(name)


def test_vllms_own_class_serves_where_ours_lacks_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a name is missing that the import of our model class needs, vLLM's own class serves, and with K26_STRICT=1 the
    start ends instead. Registration does not import our class, but the probe does and tells of the failure."""
    import vllm.multimodal

    register()
    from vllm.model_executor.models.registry import ModelRegistry

    registered = ModelRegistry.models[ARCHITECTURE]
    in_tree = compat.in_tree_model().KimiK25ForConditionalGeneration
    assert registered.load_model_cls() is not in_tree
    monkeypatch.delattr(vllm.multimodal, "MULTIMODAL_REGISTRY")
    for name in ("entry", "model"):
        monkeypatch.delitem(sys.modules, f"k26_plugins.vllm.{name}")
    monkeypatch.setattr("k26_plugins.vllm.logger.propagate", True)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert registered.load_model_cls() is in_tree
    assert "cannot import name 'MULTIMODAL_REGISTRY'" in caplog.text
    assert "vLLM's own model class serves" in caplog.text
    monkeypatch.delitem(sys.modules, "k26_plugins.vllm.entry")
    probe.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not told["active"]
    assert "cannot import name 'MULTIMODAL_REGISTRY'" in told["why_not"]
    monkeypatch.delitem(sys.modules, "k26_plugins.vllm.entry")
    monkeypatch.setenv("K26_STRICT", "1")
    with pytest.raises(SystemExit, match="MULTIMODAL_REGISTRY"):
        registered.load_model_cls()
