"""Tests of which Python files of a checkpoint transformers executes, with the plugin and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.remote_code import plant

READ = """
import sys
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
if sys.argv[1] == "shut":
    from k26_plugins.common.adapters.registration import Registration
    from k26_plugins.common.adapters.remote_code import refuse_remote_code
    for _ in range(2):
        changes = Registration()
        refuse_remote_code(changes)
        changes.apply()
for folder in sys.argv[2:]:
    for read in (
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=True),
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=True),
        lambda: get_class_from_dynamic_module("kimi_k25_processor.KimiK25Processor", folder),
    ):
        try:
            read()
        except Exception as error:
            print(type(error).__name__, error)
"""


def read(state: str, *folders: Path) -> str:
    """Let transformers read and trust these folders in a process of its own, and return what it prints. The plugin's
    refusal of remote code is on if `state` is "shut"."""
    done = subprocess.run(
        [sys.executable, "-c", READ, state, *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "HF_MODULES_CACHE": str(folders[0].parent / "modules")},
    )
    return done.stdout


def test_only_another_models_code_is_executed(tiny_folder: Path, tmp_path: Path) -> None:
    mark, other = plant(tiny_folder, tmp_path / "this" / "DIR"), plant(tiny_folder, tmp_path / "other" / "DIR")
    file = tmp_path / "other" / "DIR" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["OtherModel"]}))
    said = read("shut", tmp_path / "this" / "DIR", tmp_path / "other" / "DIR")
    assert not mark.exists(), mark.read_text()
    assert "RemoteCodeError kimi_k25_processor.KimiK25Processor of" in said
    assert "executes none for Kimi-K2.6" in said
    assert "kimi_k25_processor" in other.read_text()


def test_without_the_plugin_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    mark = plant(tiny_folder, tmp_path / "DIR")
    read("open", tmp_path / "DIR")
    assert {"configuration_kimi_k25", "kimi_k25_processor"} <= set(mark.read_text().split())
