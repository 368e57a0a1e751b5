"""Tests of the parsers and the tokenizer of a model in an object store or in ModelScope's hub."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.sglang_parts import hf_utils
from support.sglang_server import HAS_ENTRY_POINT

from k26_plugins.common.prompt.hf_tokenizer import KimiTokenizerFast


@pytest.mark.skipif(
    not HAS_ENTRY_POINT, reason="0.5.10 settles its arguments while it is imported: flags are the user's"
)
@pytest.mark.parametrize("name", ["s3://bucket/kimi", "moonshotai/Kimi-K2.6", "downloaded/before"])
def test_the_parsers_and_the_tokenizer_of_a_model_that_is_not_on_the_hub(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """SGLang asks the libraries of the object store and of ModelScope, in whose place the test puts stand-ins."""
    from sglang.srt.server_args import ServerArgs

    from k26_plugins.sglang.arguments import before_settling

    cache = tmp_path / "modelscope"
    (cache / "downloaded").mkdir(parents=True)
    (cache / "downloaded/before").symlink_to(tiny_folder)

    class ObjectStorage:
        def __init__(self, model_path: str, dst: str) -> None:
            assert model_path == name
            self.folder = dst

        def pull_files(self, allowed: Any, ignored: Any) -> None:
            assert "*.safetensors" in ignored
            shutil.copytree(tiny_folder, self.folder, ignore=shutil.ignore_patterns(*ignored))

        def __exit__(self, *error: Any) -> None: ...

    def download(model_id: str, file_path: str, revision: str | None) -> str:
        assert model_id == "moonshotai/Kimi-K2.6"
        return str(tiny_folder / file_path)

    modules: dict[str, dict[str, Any]] = {
        "runai_model_streamer": {"ObjectStorageModel": ObjectStorage},
        "modelscope": {"model_file_download": download},
        "modelscope.utils.file_utils": {"get_model_cache_root": lambda: str(cache)},
    }
    for module, members in modules.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**members))
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path))
    if "://" not in name:
        monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    arguments = ServerArgs(model_path=name)
    before_settling(lambda given: None, arguments)
    assert arguments.tool_call_parser == arguments.reasoning_parser == "kimi_k2"
    if "://" in name:
        tokenizer = hf_utils().get_tokenizer(name)
        assert isinstance(tokenizer, KimiTokenizerFast)
