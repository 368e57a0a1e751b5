"""Tests of registration, which replaces the in-tree classes in every process, either all of them or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.registration import assert_all_or_nothing
from support.sglang_server import HAS_ENTRY_POINT, boot_folder

from k26_plugins.common.model.config import ARCHITECTURE
from k26_plugins.sglang import compat, names, probe, register


def test_registration_takes_the_in_tree_classes_place_and_no_others() -> None:
    register()  # SGLang runs it in every process
    from sglang.srt.models.llama import LlamaForCausalLM
    from sglang.srt.models.registry import ModelRegistry

    model, _ = ModelRegistry.resolve_model_cls([ARCHITECTURE])
    assert model.__module__ == "k26_plugins.sglang.model"
    assert issubclass(model, compat.in_tree_model().KimiK25ForConditionalGeneration)
    assert ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])[0] is LlamaForCausalLM


def test_the_probe_imports_the_models_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The probe has to import the model's class itself, because SGLang's registry only logs a failed import, and
    registration succeeds all the same."""

    def told() -> dict[str, Any]:
        probe.main()
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    assert told()["active"]
    monkeypatch.setitem(sys.modules, "k26_plugins.sglang.models.entry", None)
    state = told()
    assert not state["active"]
    assert "the model's class cannot be imported" in state["why_not"]


def test_a_failing_registration_leaves_sglang_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compat, "register_models", lambda changes, package: 1 / 0)
    register()
    assert "k26-plugins is not active" in caplog.text


@pytest.mark.skipif(
    not HAS_ENTRY_POINT, reason="SGLang 0.5.10 has no registry of hooks, and calls the adapter otherwise"
)
def test_registration_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each name that registration looks up is made to be missing in turn, and each time SGLang's registries, hooks and
    variables stay as they were."""
    import transformers.dynamic_module_utils as doors
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import ServerArgs

    configs = compat._config_registry()
    processors = compat.private(names.CUSTOMIZED_PROCESSORS)
    target = next(iter(name for name in HookRegistry._hooks if name.endswith(".get_tokenizer")))
    for registry, key in (
        (ModelRegistry.models, ARCHITECTURE),
        (configs, compat.MODEL_TYPE),
        (processors, compat.MODEL_TYPE),
    ):
        monkeypatch.setitem(registry, key, "SGLang's own")
    monkeypatch.setitem(HookRegistry._hooks, target, [])
    monkeypatch.delenv(compat.MEDIA_VARIABLE)
    monkeypatch.delenv(compat.MODELS_VARIABLE)
    for name in ("resolve_trust_remote_code", "get_class_from_dynamic_module"):
        monkeypatch.setattr(doors, name, lambda: None)
    monkeypatch.setattr(ServerArgs, "resolve_once", lambda arguments: None)

    def state() -> tuple[Any, ...]:
        return (
            ModelRegistry.models[ARCHITECTURE], dict(configs), dict(processors),
            list(HookRegistry._hooks[target]), os.environ.get(compat.MEDIA_VARIABLE),
            os.environ.get(compat.MODELS_VARIABLE), vars(ServerArgs)["resolve_once"], doors.resolve_trust_remote_code,
            doors.get_class_from_dynamic_module,
        )  # fmt: skip

    before, looked_up = state(), assert_all_or_nothing(compat, register, state, caplog)
    assert looked_up >= 2
    # The last registration found every name, and has changed each part of the state.
    assert not any(one == other for one, other in zip(before, state(), strict=True))


def test_the_environment_variable_of_0_5_10_makes_it_active(tmp_path: Path) -> None:
    """The plugin's `sitecustomize`, which PYTHONPATH names, registers the adapter; another one on the path runs too."""
    (tmp_path / "sitecustomize.py").write_text("print('the other runs')\n")
    code = (
        "import sglang.srt.utils.hf_transformers_utils as utils, sglang.srt.managers.detokenizer_manager as manager\n"
        "from k26_plugins.sglang import compat\n"
        "print(compat._config_registry()['kimi_k25'].__module__, manager.get_tokenizer is utils.get_tokenizer)"
    )
    path = os.pathsep.join((boot_folder(), str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.splitlines()[0] == "the other runs"
    assert done.stdout.splitlines()[-1] == "k26_plugins.sglang.config True"
