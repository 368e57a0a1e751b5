"""What can be held without a server, on the oldest supported vLLM as on the newest: registration, names, weights."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_names import read_snapshot
from support.data_urls import WRITERS
from support.images import png, random_image
from support.layouts import OTHER, PUBLISHED, make
from support.registration import assert_all_or_nothing
from support.remote_code import plant
from support.versions import wrong_entries
from support.vllm_server import cli_args_module

from k26_plugins.common.adapters.engine import EngineName, UnsupportedEngineError
from k26_plugins.common.adapters.serving import core_answer
from k26_plugins.common.checkpoint import Checkpoint, CheckpointError, expert_name, shard
from k26_plugins.common.model.config import ARCHITECTURE, K26Config
from k26_plugins.common.multimodal.image import MediaError
from k26_plugins.common.prompt.hf_tokenizer import core_serves_prompts
from k26_plugins.vllm import compat, config, names, probe, register
from k26_plugins.vllm.experts import K26ExpertsMethod
from k26_plugins.vllm.media import K26MediaConnector


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
    """Without each name that it looks up, in turn: vLLM's registries and hooks are as they were."""
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
    # The last try had every name.
    assert not any(one == other for one, other in zip(before, state(), strict=True))


def test_vllms_own_class_serves_where_ours_lacks_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the import of our class needs it, which registration does not do and the probe does; with K26_STRICT=1 the
    start ends."""
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


def test_a_name_that_vllm_lost_is_one_clear_error() -> None:
    name = EngineName("vllm.nothing", "Here", why="test it", remove_when="never")
    with pytest.raises(UnsupportedEngineError, match=r"vLLM .* has no vllm.nothing.Here.*checked on vLLM"):
        compat.private(name)
    with pytest.raises(UnsupportedEngineError, match="which k26-plugins needs to test it:"):
        compat.private(name)


def test_a_cache_of_compiled_code_that_has_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a system's folder and a home that is none, as of a service's user: numba's own search finds nothing."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert "set NUMBA_CACHE_DIR" in probe.no_compiled_code_cache("/proc/version")
    (tmp_path / "module.py").touch()
    assert probe.no_compiled_code_cache(str(tmp_path / "module.py")) == ""


FLAGS: dict[str, tuple[list[str], str | None, str | None]] = {
    "no flag": ([], "ours", "ours"),
    "both by hand": (["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"], "hermes", "qwen3"),
    "switched off": ([], None, None),
}
"""Of the command line, and the parsers of tool calls and of reasoning that come of it."""


@pytest.mark.parametrize("name", FLAGS)
def test_the_parsers_for_a_model_in_an_object_store(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """vLLM fetches the small files and streams the weights: the folder that it keeps has an index and no shard."""
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


def hf_config(folder: Path) -> Any:
    from vllm.transformers_utils.config import get_config

    return get_config(str(folder), trust_remote_code=False)


def test_the_configuration_is_understood_and_written_back(tiny_folder: Path) -> None:
    class ModelConfig:
        model = str(tiny_folder)
        revision = None

    ModelConfig.hf_config = hf_config(tiny_folder)  # type: ignore[attr-defined]
    ModelConfig.hf_config.vision_config.hidden_size = 1152  # type: ignore[attr-defined]
    config.prepare(ModelConfig)
    found = ModelConfig.hf_config  # type: ignore[attr-defined]
    assert found.vision_config.hidden_size == 144
    assert compat.media_token_id(found) == 277


@pytest.mark.parametrize("trusted", [False, True])
def test_no_file_of_the_checkpoint_is_executed(tiny_folder: Path, tmp_path: Path, trusted: bool) -> None:
    """By all that vLLM builds before the model: configuration, tokenizer, processor."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.tokenizers import cached_tokenizer_from_config

    register()
    mark = plant(tiny_folder, tmp_path / "DIR")
    model_config = ModelConfig(str(tmp_path / "DIR"), trust_remote_code=trusted, enforce_eager=True, max_model_len=4096)
    assert model_config.tokenizer_mode == compat.TOKENIZER_MODE
    cached_tokenizer_from_config(model_config)
    MULTIMODAL_REGISTRY.create_processor(model_config)
    assert not mark.exists(), mark.read_text()


def test_a_token_that_vllm_adds_is_one_token(tiny_folder: Path) -> None:
    """For the places of embeddings in a chat. vLLM keeps the tokenizer's length as it was, and copies the tokenizer."""
    from k26_plugins.vllm.tokenizer import K26Tokenizer

    tokenizer = copy.copy(K26Tokenizer.from_pretrained(tiny_folder))
    length = len(tokenizer)
    assert len(tokenizer.encode("a<place>", add_special_tokens=False)) == 8
    tokenizer.add_special_tokens({"additional_special_tokens": ["<place>"]})
    for one in (tokenizer, copy.deepcopy(tokenizer)):
        assert one.encode("a<place>", add_special_tokens=False) == [ord("a"), length]


def test_a_worker_without_the_package_cannot_read_the_configuration(tiny_folder: Path, tmp_path: Path) -> None:
    """As on another machine of a Ray cluster, where every rank may lack it and none can miss it in another."""
    from vllm.config import ModelConfig

    register()
    model_config = ModelConfig(str(tiny_folder), enforce_eager=True, max_model_len=4096)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(copy.deepcopy(model_config)))
    read = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    absent = "import sys; sys.modules['k26_plugins'] = None; "
    with_package, without = (
        subprocess.run(
            [sys.executable, "-c", before + read, str(tmp_path / "config.pickle")],
            check=False,
            capture_output=True,
            text=True,
        )
        for before in ("", absent)
    )
    assert with_package.stdout.strip().endswith("ModelConfig"), with_package.stderr
    assert without.returncode != 0
    assert "No module named 'k26_plugins" in without.stderr, without.stderr


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_is_left_to_vllm(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """By vLLM's own reading of the configuration, with the reason in one line."""
    folder = make(OTHER[name][0], tiny_folder, tmp_path / "made")
    warnings: list[str] = []
    assert core_answer(hf_config(folder), folder, warnings.append) is None
    assert len(warnings) == 1
    assert "the engine's own code serves it" in warnings[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layout_is_the_cores(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = make(PUBLISHED[name], tiny_folder, tmp_path / "made")
    answer = core_answer(hf_config(folder), folder, pytest.fail)
    assert answer is not None
    assert answer.config == K26Config.from_path(folder)


def test_the_methods_weights_are_the_checkpoints(tiny_folder: Path) -> None:
    """Construction and loading by hand of one layer's experts, whole and as two tensor-parallel ranks that are summed."""
    checkpoint = Checkpoint(tiny_folder)
    text = checkpoint.config.text
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, text.hidden_size, generator=generator).to(torch.bfloat16)
    ids = torch.randint(0, text.n_routed_experts, (9, 2), generator=generator, dtype=torch.int32)
    weights = torch.rand(9, 2, generator=generator)

    def run(rank: int, size: int) -> torch.Tensor:
        layer = torch.nn.Module()
        inner = text.moe_intermediate_size // size
        method = K26ExpertsMethod.__new__(K26ExpertsMethod)
        method.backend_name = "auto"
        method.create_weights(layer, text.n_routed_experts, text.hidden_size, inner, torch.bfloat16)
        for expert in range(text.n_routed_experts):
            for part in ("packed", "scale"):
                cut = {
                    projection: shard(checkpoint.tensor(name), checkpoint.table[name], rank, size)
                    for projection in ("gate", "up", "down")
                    for name in [expert_name(1, expert, projection, part)]
                }
                getattr(layer, f"w13_weight_{part}").data[expert] = torch.cat((cut["gate"], cut["up"]))
                getattr(layer, f"w2_weight_{part}").data[expert] = cut["down"]
        method.experts.close()
        out = torch.empty_like(x)
        method.experts.apply(out, x, weights, ids)
        return out.float()

    whole = run(0, 1)
    assert ((run(0, 2) + run(1, 2) - whole).norm() / whole.norm()).item() < 6e-3


def test_what_must_be_loaded_is_what_vllms_loader_promises(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a checkpoint, but for what its own filters leave out: experts of other ranks, a language model's files."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from k26_plugins.vllm.model import KimiK25ForConditionalGeneration, files_of_checkpoint, whole_checkpoint

    checkpoint = Checkpoint(tiny_folder)
    read = list(checkpoint.table)
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", DefaultModelLoader.get_all_weights)
    compat.hook_checkpoint_loader(whole_checkpoint, files_of_checkpoint)
    monkeypatch.setattr(
        DefaultModelLoader, "_get_weights_iterator", lambda self, source: ((n, checkpoint.tensor(n)) for n in read)
    )
    model = KimiK25ForConditionalGeneration.__new__(KimiK25ForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.core_config = checkpoint.config
    loader = DefaultModelLoader(LoadConfig())

    class ModelConfig:
        model, revision = str(tiny_folder), None

    def loaded() -> list[str]:
        return [name for name, _ in loader.get_all_weights(ModelConfig, model)]

    assert loaded() == read
    read = [name for name, spec in checkpoint.table.items() if spec.expert in (None, 0, 1)]
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: .*experts\.2\."):
        loaded()
    loader.local_expert_ids = {0, 1}
    assert loaded() == read
    read = [name for name in read if not name.startswith("language_model.")]
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: language_model\."):
        loaded()
    loader._encoder_only_lm_prefixes = ("language_model.",)
    assert loaded() == read


@pytest.mark.parametrize("writer", WRITERS)
def test_data_urls_are_read_as_their_writers_put_them(writer: str) -> None:
    """vLLM 0.19.1 gives what its parser of addresses made of them."""
    image = random_image(60, 40)
    found = K26MediaConnector().fetch_image(f"DATA:image/png;BASE64,{WRITERS[writer](png(image))}")
    assert np.array_equal(np.asarray(found.media), np.asarray(image))
    with pytest.raises(MediaError, match="no base64"):
        K26MediaConnector().fetch_image("data:image/png;base64,aGVsb")
    with pytest.raises(MediaError, match="no URL"):
        K26MediaConnector().fetch_image("")


def test_the_snapshot_says_what_this_release_has() -> None:
    """By reading its files it was made; here the engine itself is asked."""
    snapshot = read_snapshot("vllm")[compat.vllm_version().split("+")[0]]
    assert wrong_entries(snapshot) == {}


def test_each_piece_can_be_left_to_vllm(tiny_folder: Path) -> None:
    """One at a time, the others stay ours: each in a process in which no plugin was loaded before, as in a server."""
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
    # Before 0.32, with a configuration of its own, vLLM has its tokenizer from the checkpoint's code, and before 0.25 its
    # processor: the plugin executes neither.
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


def test_a_tokenizer_json_alone_is_left_to_vllm(tiny_folder: Path, tmp_path: Path) -> None:
    """Beside `tiktoken.model` it changes nothing."""
    folder = tmp_path / "DIR"
    shutil.copytree(tiny_folder, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert core_serves_prompts(folder)
    (folder / "tiktoken.model").unlink()
    assert not core_serves_prompts(folder)
    (folder / "tokenizer.json").unlink()
    assert core_serves_prompts(folder)  # and its absence is one clear error
