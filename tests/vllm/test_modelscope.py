"""A test of a model by its name in ModelScope's hub.

ModelScope's own client asks a hub on this machine, and no other hub can be reached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.modelscope_hub import modelscope_hub
from support.vllm_server import cli_args_module

from k26_plugins.vllm import compat

NAME = "moonshotai/Kimi-K2.6"
# This code runs in a process of its own, because vLLM reads VLLM_USE_MODELSCOPE when it is imported.
START = f"""
import json
import torch
from k26_plugins.vllm.files import readable_by_vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import AsyncEngineArgs
from {cli_args_module()} import make_arg_parser
from vllm.model_executor.layers.fusion.mm_input_norm import build_mm_input_norm
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

flags = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "{NAME}", "--max-model-len", "2048"])
engine_args = AsyncEngineArgs.from_cli_args(flags)
model_config = engine_args.create_model_config()
tokenizer = cached_tokenizer_from_config(model_config)
processor = MULTIMODAL_REGISTRY.create_processor(model_config)
with set_current_vllm_config(VllmConfig()), readable_by_vllm(model_config):
    normalize = build_mm_input_norm(model_config)
black_and_white = torch.tensor([[0] * 3, [255] * 3], dtype=torch.uint8)
print(json.dumps({{
    "model": model_config.model,
    "published": model_config.k26_plugins.core_config is not None,
    "parsers": [flags.tool_call_parser, flags.reasoning_parser],
    "text": tokenizer.decode(tokenizer.encode("Is it warm in 北京?")),
    "normalized": normalize.forward_native(black_and_white, torch.float32).flatten().tolist(),
    "image_processor": type(processor.info.image_processor).__name__,
}}))
"""


def start(environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", START],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(find_spec("modelscope") is None, reason="ModelScope's client is not installed")
def test_a_model_by_modelscope_s_name(tiny_folder: Path, tmp_path: Path) -> None:
    """Everything that a start reads before the weights comes from ModelScope's hub; the weights would come later, when
    the workers load them."""
    with modelscope_hub(NAME, tiny_folder) as (address, fetched):
        found = start(
            {
                "VLLM_USE_MODELSCOPE": "True",
                "MODELSCOPE_ENDPOINT": address,
                "MODELSCOPE_CACHE": str(tmp_path / "cache"),
                # Nothing answers at this address.
                "HF_ENDPOINT": "http://127.0.0.1:9",
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "hub"),
            }
        )
    assert found["model"] == NAME
    assert found["published"]
    assert found["parsers"] == [compat.PARSER, compat.PARSER]
    assert found["text"] == "Is it warm in 北京?"
    # The model's mean and standard deviation are one half.
    assert found["normalized"] == [-1.0] * 3 + [1.0] * 3
    assert found["image_processor"] == "K26ImageProcessor"
    small = {file.name for file in tiny_folder.iterdir() if file.suffix != ".safetensors"}
    assert set(fetched) == small
    assert len(fetched) == len(small)
