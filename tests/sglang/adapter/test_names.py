"""Tests of the names that the adapter looks up in SGLang: which this release has, and what serves if one is gone."""

from __future__ import annotations

import inspect
import logging
import sys

import pytest
import torch
from engine_names import read_snapshot
from support import sglang_foreign_kernels
from support.versions import wrong_entries

from k26_plugins.common.adapters.engine import EngineName, UnsupportedEngineError
from k26_plugins.sglang import compat


def test_the_snapshot_says_what_this_release_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot was made by reading the release's files; here the engine itself is asked."""
    for name in sglang_foreign_kernels.NAMES:
        if not hasattr(torch.ops.sgl_kernel, name):
            monkeypatch.setattr(torch.ops.sgl_kernel, name, None, raising=False)
    snapshot = read_snapshot(compat.distribution()[0])[compat.sglang_version()]
    assert wrong_entries(snapshot) == {}


def test_a_name_that_sglang_lost_is_one_clear_error() -> None:
    name = EngineName("sglang.nothing", "Here", why="test it", remove_when="never")
    with pytest.raises(UnsupportedEngineError, match=r"sglang .* has no sglang.nothing.Here.*checked on sglang"):
        compat.private(name)


def test_sglangs_own_class_serves_where_ours_lacks_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If a name is missing that the import of our model class needs, but not the registration, SGLang's own class
    serves; with K26_STRICT=1 the start ends instead."""
    from sglang.srt.models.registry import import_model_classes

    in_tree = compat.in_tree_model().KimiK25ForConditionalGeneration

    def forget() -> None:
        for name in ("model", "models.entry"):
            monkeypatch.delitem(sys.modules, f"k26_plugins.sglang.{name}", raising=False)

    monkeypatch.delattr(sys.modules[in_tree.__module__], in_tree.__name__)
    monkeypatch.setattr("k26_plugins.sglang.logger.propagate", True)
    monkeypatch.setattr(logging.getLogger("sglang"), "propagate", True)
    forget()
    # SGLang caches this function's result for each package; the test calls the function inside the cache.
    found = inspect.unwrap(import_model_classes)
    assert found("k26_plugins.sglang.models") == {}
    assert "SGLang's own model class serves" in caplog.text
    forget()
    monkeypatch.setenv("K26_STRICT", "1")
    with pytest.raises(SystemExit, match=in_tree.__name__):
        found("k26_plugins.sglang.models")
