"""Tests of registration, which replaces the in-tree classes, either all of them or none, and leaves to vLLM what the
user asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.registration import assert_all_or_nothing

from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.vllm import compat, names, probe, register


def test_registration_takes_the_in_tree_classes_place() -> None:
    register()
    register()  # vLLM runs it in every process, some twice
    from vllm.model_executor.models.registry import ModelRegistry

    model = ModelRegistry.models[ARCHITECTURE]
    assert model.load_model_cls().__module__ == "k26_plugins.vllm.model"
    loaded = model.load_model_cls()
    assert loaded.__name__ == ARCHITECTURE
    assert issubclass(loaded, compat.in_tree_model().KimiK25ForConditionalGeneration)


def test_a_failing_registration_leaves_vllm_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "register_model", lambda changes, module: 1 / 0)
    register()
    assert "k26-plugins is not active" in caplog.text


def test_registration_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each name that registration looks up is made to be missing in turn, and each time vLLM's registries and hooks
    stay as they were."""
    import transformers.dynamic_module_utils as doors
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    registries = [
        (compat.private(names.MODEL_REGISTRY).models, ARCHITECTURE),
        (compat.private(names.MODELS_CONFIG_MAP), ARCHITECTURE),
        (compat.private(names.TOKENIZER_REGISTRY).tokenizers, compat.TOKENIZER_MODE),
        (compat.private(names.RENDERER_REGISTRY).renderers, compat.TOKENIZER_MODE),
    ]
    if compat.has_kimi_parser():
        registries += [
            (compat.private(names.TOOL_PARSERS).lazy_parsers, compat.PARSER),
            (compat.private(names.REASONING_PARSERS).lazy_parsers, compat.PARSER),
        ]
    for registry, key in registries:
        monkeypatch.setitem(registry, key, "vLLM's own")
    for registry, key in registries[2:]:
        monkeypatch.delitem(registry, key)
    for name in ("resolve_trust_remote_code", "get_class_from_dynamic_module"):
        monkeypatch.setattr(doors, name, lambda: None)
    monkeypatch.setattr(ModelConfig, "get_model_arch_config", lambda config: None)
    monkeypatch.setattr(AsyncEngineArgs, "from_cli_args", classmethod(lambda cls, arguments: None))
    monkeypatch.setattr(AsyncEngineArgs, "create_model_config", lambda arguments: None)

    def state() -> tuple[Any, ...]:
        return (
            *(registry.get(key) for registry, key in registries), vars(ModelConfig)["get_model_arch_config"],
            vars(AsyncEngineArgs)["from_cli_args"], vars(AsyncEngineArgs)["create_model_config"],
            doors.resolve_trust_remote_code,
            doors.get_class_from_dynamic_module,
        )  # fmt: skip

    before, looked_up = state(), assert_all_or_nothing(compat, register, state, caplog)
    assert looked_up >= 5
    # The last registration found every name, and has changed each part of the state.
    assert not any(one == other for one, other in zip(before, state(), strict=True))


def test_each_piece_can_be_left_to_vllm(tiny_folder: Path) -> None:
    """Prompts, parsers and media can each be left to vLLM, and the other pieces stay ours. Each case runs in a process
    in which no plugin was loaded before, as in a server."""
    script = f"""
import json, os, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
for variable in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    os.environ[variable] = "engine"
    load_general_plugins()
    arguments = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", {str(tiny_folder)!r}])
    arguments.tool_call_parser, arguments.enable_auto_tool_choice = None, False
    config = AsyncEngineArgs.from_cli_args(arguments).create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    pieces = {{
        "prompts": config.tokenizer_mode,
        "parsers": arguments.tool_call_parser,
        "media": [type(one).__module__ for one in (processor, processor.info)],
        "connector": os.environ.get("VLLM_MEDIA_CONNECTOR"),
    }}
    print("FOUND", variable, json.dumps(pieces), flush=True)
    os._exit(0)
"""
    ours = {
        "prompts": "k26",
        "parsers": "k26" if compat.has_kimi_parser() else "kimi_k2",
        "media": ["k26_plugins.vllm.processing"] * 2,
        "connector": "k26",
    }
    theirs: dict[str, dict[str, Any]] = {"K26_PARSERS": {"parsers": "kimi_k2"}}
    # Before 0.32 vLLM has a configuration class of its own for this model and takes its tokenizer from the checkpoint's
    # code; before 0.25 it also takes its processor from there. The plugin executes neither, so these cases are left
    # out.
    if find_spec("vllm.transformers_utils.configs.kimi_k25") is None:
        theirs["K26_PROMPTS"] = {"prompts": "auto"}
    if find_spec("vllm.transformers_utils.processors.kimi_k25_vision_fused") is not None:
        theirs["K26_MEDIA"] = {"media": ["vllm.model_executor.models.kimi_k25"] * 2, "connector": None}
    command = [sys.executable, "-c", script, *theirs]
    # Another test of this process may have chosen the connector.
    env = {name: value for name, value in os.environ.items() if name != "VLLM_MEDIA_CONNECTOR"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300, env=env).stdout
    found = dict(line.split(" ", 2)[1:] for line in out.splitlines() if line.startswith("FOUND "))
    assert {variable: json.loads(pieces) for variable, pieces in found.items()} == {
        variable: ours | changed for variable, changed in theirs.items()
    }


def test_a_cache_of_compiled_code_that_has_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a service's user has no home and the module's file lies in a folder of the system, numba's own search finds no
    place for its cache, and the probe says which variable to set."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert "set NUMBA_CACHE_DIR" in probe.no_compiled_code_cache("/proc/version")
    (tmp_path / "module.py").touch()
    assert probe.no_compiled_code_cache(str(tmp_path / "module.py")) == ""
