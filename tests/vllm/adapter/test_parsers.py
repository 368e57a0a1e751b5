"""Tests of the parsers of tool calls and reasoning on which vLLM settles from its command line."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.vllm_server import cli_args_module

from k26_plugins.vllm import compat, register

FLAGS: dict[str, tuple[list[str], str | None, str | None]] = {
    "no flag": ([], "ours", "ours"),
    "both by hand": (["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"], "hermes", "qwen3"),
    "switched off": ([], None, None),
}
"""(Flags of the command line, tool-call parser, reasoning parser) of each case; "ours" is the plugin's choice."""


@pytest.mark.parametrize("name", FLAGS)
def test_the_parsers_for_a_model_in_an_object_store(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """vLLM fetches the small files of such a model and streams its weights, so that the folder that vLLM keeps has an
    index of the weights but no safetensors shard."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.transformers_utils import runai_utils
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def pull(source: str, folder: str, *patterns: Any) -> None:
        assert source.startswith("s3://bucket/kimi")
        for file in tiny_folder.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, folder)
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-1.safetensors"}}
        (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index))

    register()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(runai_utils, "runai_pull_files", pull)
    flags, tool_parser, reasoning_parser = FLAGS[name]
    if name == "switched off":
        monkeypatch.setenv("K26_PARSERS", "none")
    parser = importlib.import_module(cli_args_module()).make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "s3://bucket/kimi", *flags])
    engine_args = AsyncEngineArgs.from_cli_args(arguments)
    engine_args.create_model_config()
    ours = compat.PARSER if compat.has_kimi_parser() else "kimi_k2"
    assert arguments.tool_call_parser == (ours if tool_parser == "ours" else tool_parser)
    expected = ours if reasoning_parser == "ours" else reasoning_parser
    assert (arguments.reasoning_parser or None) == (engine_args.reasoning_parser or None) == expected
