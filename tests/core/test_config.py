"""Tests that the configuration is read from three schemas (the hub's, transformers' and SGLang's), and of what is
refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from k26_plugins.common.model.config import (
    ConfigError,
    K26Config,
    OtherLayoutError,
    TextConfig,
    VisionConfig,
    YarnConfig,
)


@pytest.fixture
def hub(tiny_folder: Path) -> dict[str, Any]:
    """Return the tiny checkpoint's config.json with the hub's names only."""
    config: dict[str, Any] = json.loads((tiny_folder / "config.json").read_text())
    for name in ("image_token_id", "projection_layer_norm_eps", "projection_hidden_size"):
        del config[name]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        del config["vision_config"][name]
    for name in ("pos_emb_height", "pos_emb_width", "pos_emb_time"):
        del config["vision_config"][name]
    return config


def test_softmax_scale_is_the_specifications() -> None:
    assert TextConfig().softmax_scale == pytest.approx(0.1446796258, abs=1e-10)


def test_hub_schema(hub: dict[str, Any]) -> None:
    config = K26Config.from_dict(hub)
    assert (config.vision.hidden_size, config.vision.num_hidden_layers) == (144, 2)
    assert config.text.rope_scaling == YarnConfig()
    assert config.media_placeholder_token_id == 256 + 21


def test_transformers_schema(tiny_folder: Path, hub: dict[str, Any]) -> None:
    """Transformers renames rope_scaling, fills in defaults and drops nothing that matters."""
    from_transformers = AutoConfig.from_pretrained(tiny_folder).to_dict()
    assert "rope_parameters" in from_transformers["text_config"]
    assert K26Config.from_dict(from_transformers) == K26Config.from_dict(hub)


def test_sglang_schema(hub: dict[str, Any]) -> None:
    """SGLang's configuration class has plain names with `init_pos_emb_*`, and lifts the quantization to the top
    level."""
    expected = K26Config.from_dict(hub)
    vision = hub["vision_config"]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
        vision[name] = vision.pop(f"vt_{name}")
    hub["quantization_config"] = hub["text_config"].pop("quantization_config")
    hub["text_config"]["rope_scaling"]["rope_type"] = "deepseek_yarn"
    assert K26Config.from_dict(hub) == expected


def test_the_hubs_spelling_wins_over_class_defaults(hub: dict[str, Any]) -> None:
    hub["vision_config"]["hidden_size"] = VisionConfig().hidden_size
    assert K26Config.from_dict(hub).vision.hidden_size == 144


def _set(config: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    for name in parents:
        config = config[name]
    config[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("architectures", ["DeepseekV3ForCausalLM"]),
        ("model_type", "kimi_k3"),
        ("text_config.model_type", "llama"),
        ("text_config.scoring_func", "softmax"),
        ("text_config.n_group", 8),
        ("text_config.hidden_size", 100),
        ("text_config.hidden_size", "128"),
        ("text_config.num_experts_per_tok", 9),
        ("text_config.num_hidden_layers", 0),
        ("text_config.rope_scaling.type", "linear"),
        ("text_config.rope_scaling.factor", -1),
        ("text_config.rms_norm_eps", None),
        ("vision_config.merge_type", "other"),
        ("vision_config.vt_num_attention_heads", 5),
        ("vision_config.text_hidden_size", 64),
        ("media_placeholder_token_id", 512),
    ],
)
def test_impossible_values_are_refused_by_name(hub: dict[str, Any], path: str, value: object) -> None:
    _set(hub, path, value)
    with pytest.raises(ConfigError) as raised:
        K26Config.from_dict(hub)
    assert path.rsplit(".", 1)[-1].removeprefix("vt_").replace("num_attention_heads", "hidden_size") in str(
        raised.value
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [("quant_method", "modelopt"), ("format", "float-quantized"), ("config_groups.group_0.weights.num_bits", 8)],
)
def test_another_quantization_is_told_apart(hub: dict[str, Any], path: str, value: object) -> None:
    """NVFP4 and other formats are the engine's to serve, so the adapters must recognize them."""
    damaged = copy.deepcopy(hub)
    _set(damaged["text_config"]["quantization_config"], path, value)
    with pytest.raises(OtherLayoutError, match=path.rsplit(".", 1)[-1]):
        K26Config.from_dict(damaged)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        K26Config.from_path(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        K26Config.from_path(tmp_path)
