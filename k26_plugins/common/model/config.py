"""Kimi-K2.6's configuration, typed and validated, read from any of the three schemas in which it occurs.

The hub's `config.json` (`vt_*`, `init_pos_emb_*`), SGLang's `KimiK25Config` and transformers' `Kimi_K25Config`
(`pos_emb_*`, `image_token_id`) name the same facts differently; `K26Config.from_dict` reads each. If a mapping has both
spellings of a field, the hub's wins, because engines fill the other spelling with the defaults of their class and never
touch the hub's.

The defaults are the published model's; docs/model.md explains them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from k26_plugins.common.model.departures import departures, is_yarn

ARCHITECTURE = "KimiK25ForConditionalGeneration"
MODEL_TYPES = ("kimi_k25",)
TEXT_MODEL_TYPES = ("kimi_k2", "deepseek_v3")
PACK_FACTOR = 8
"""INT4 values in an int32."""


class ConfigError(ValueError):
    """A configuration that is not Kimi-K2.6's or that contradicts itself. The message names the field."""


class OtherLayoutError(ConfigError):
    """The architecture of Kimi-K2.6 in a layout other than the published one, or with a part that the core does not compute.

    The engine's own code may serve such a checkpoint.
    """


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ConfigError(
        f"config field {name!r} is {value!r}, expected {expected}. k26-plugins serves the Kimi-K2.5/K2.6 architecture "
        f"only: check that the folder holds an unchanged config.json of that model."
    )


def _positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            _refuse(f"{prefix}.{name}", value, "a positive integer")


def _multiple(prefix: str, config: object, name: str, of: int, why: str) -> None:
    value = getattr(config, name)
    if value % of:
        _refuse(f"{prefix}.{name}", value, f"a multiple of {of} ({why})")


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """YaRN rotary scaling (Peng et al. 2023), which this model always uses."""

    factor: float = 64.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        _positive("text_config.rope_scaling", self, "original_max_position_embeddings")
        for name in ("factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                _refuse(f"text_config.rope_scaling.{name}", value, "a positive number")

    def magnitude(self, mscale: float) -> float:
        """Return YaRN's attention temperature term, 0.1 · mscale · ln(factor) + 1; 1 if `factor` is at most 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """Symmetric INT4 in groups along the input dimension, as compressed-tensors' `pack-quantized` stores it."""

    num_bits: int = 4
    group_size: int = 32

    def __post_init__(self) -> None:
        prefix = "quantization_config.config_groups.weights"
        if self.num_bits != 4:
            _refuse(f"{prefix}.num_bits", self.num_bits, "4")
        if self.group_size != 32:
            _refuse(f"{prefix}.group_size", self.group_size, "32")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """The text decoder: DeepSeek-V3's architecture with Kimi's sizes."""

    vocab_size: int = 163840
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 1
    n_routed_experts: int = 384
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    routed_scaling_factor: float = 2.827
    norm_topk_prob: bool = True
    num_attention_heads: int = 64
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    max_position_embeddings: int = 262144
    rope_scaling: YarnConfig = field(default_factory=YarnConfig)
    quantization: QuantConfig = field(default_factory=QuantConfig)

    def __post_init__(self) -> None:
        prefix = "text_config"
        _positive(prefix, self, "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size")
        _positive(prefix, self, "num_hidden_layers", "n_routed_experts", "num_experts_per_tok", "n_shared_experts")
        _positive(prefix, self, "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")
        _positive(prefix, self, "qk_rope_head_dim", "v_head_dim", "max_position_embeddings")
        group = self.quantization.group_size
        for name in ("hidden_size", "moe_intermediate_size"):
            _multiple(prefix, self, name, group, "one INT4 scale covers a group of that many inputs")
        _multiple(prefix, self, "qk_rope_head_dim", 2, "rotary embedding turns pairs")
        if self.num_experts_per_tok > self.n_routed_experts:
            _refuse(f"{prefix}.num_experts_per_tok", self.num_experts_per_tok, f"at most {self.n_routed_experts}")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            _refuse(f"{prefix}.first_k_dense_replace", self.first_k_dense_replace, f"0 to {self.num_hidden_layers}")
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                _refuse(f"{prefix}.{name}", value, "a positive number")

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key: the part without rotary embedding and the part with it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Scale of the attention scores in the plain and in the absorbed form: 0.1446796258 for the published model."""
        scale: float = self.qk_head_dim**-0.5 * self.rope_scaling.magnitude(self.rope_scaling.mscale_all_dim) ** 2
        return scale

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether `layer`, counted from 0, has routed experts; the first layers are dense."""
        return layer >= self.first_k_dense_replace


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The configuration of MoonViT-3d and its projector."""

    patch_size: int = 14
    hidden_size: int = 1152
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    intermediate_size: int = 4304
    pos_emb_height: int = 64
    pos_emb_width: int = 64
    pos_emb_time: int = 4
    merge_kernel_size: tuple[int, int] = (2, 2)
    layer_norm_eps: float = 1e-5
    projector_ln_eps: float = 1e-5
    text_hidden_size: int = 7168

    def __post_init__(self) -> None:
        prefix = "vision_config"
        _positive(prefix, self, "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        _positive(prefix, self, "intermediate_size", "pos_emb_height", "pos_emb_width", "pos_emb_time")
        _positive(prefix, self, "text_hidden_size")
        _multiple(prefix, self, "hidden_size", self.num_attention_heads, "every head has the same width")
        if self.head_dim % 4:
            _refuse(f"{prefix}.hidden_size", self.hidden_size, "heads of a multiple of 4 (x and y rotary pairs)")
        if self.merge_kernel_size != (2, 2):
            _refuse(f"{prefix}.merge_kernel_size", self.merge_kernel_size, "(2, 2)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def merged_size(self) -> int:
        """Width of one 2 × 2 block of patches, the projector's input."""
        return self.hidden_size * self.merge_kernel_size[0] * self.merge_kernel_size[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class K26Config:
    """The configuration of the whole model."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    bos_token_id: int = 163584
    eos_token_id: int = 163586
    pad_token_id: int = 163839
    media_placeholder_token_id: int = 163605

    def __post_init__(self) -> None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "media_placeholder_token_id"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < self.text.vocab_size:
                _refuse(name, value, f"a token id below vocab_size {self.text.vocab_size}")
        if self.vision.text_hidden_size != self.text.hidden_size:
            _refuse(
                "vision_config.text_hidden_size",
                self.vision.text_hidden_size,
                f"text_config.hidden_size, {self.text.hidden_size}",
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> K26Config:
        """Read a `config.json` mapping, or an engine's configuration converted to a mapping.

        Raises ConfigError, which names the field, for another architecture or for a value that this model cannot have,
        and OtherLayoutError for a configuration that departs from the published layout.
        """
        found, other = cls.read(config)
        if other:
            raise OtherLayoutError(other[0])
        return found

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[K26Config, list[str]]:
        """Read the sizes of a checkpoint of this architecture, and list its departures from the published layout.

        If the list is not empty, the returned configuration describes only how large the model is, not how it is
        stored. Raises ConfigError.
        """
        _check_architecture(config)
        text = config.get("text_config")
        vision = config.get("vision_config")
        if not isinstance(text, Mapping):
            _refuse("text_config", text, "an object")
        if not isinstance(vision, Mapping):
            _refuse("vision_config", vision, "an object")
        if text.get("model_type", TEXT_MODEL_TYPES[0]) not in TEXT_MODEL_TYPES:
            _refuse("text_config.model_type", text["model_type"], " or ".join(map(repr, TEXT_MODEL_TYPES)))
        text_fields = _pick("text_config", TextConfig, text, {})
        text_fields["rope_scaling"] = _read_yarn(text)
        text_fields["rope_theta"] = (text.get("rope_parameters") or {}).get("rope_theta", text.get("rope_theta"))
        if text_fields["rope_theta"] is None:
            _refuse("text_config.rope_theta", None, "a number")
        vision_fields = _pick("vision_config", VisionConfig, vision, _VISION_SPELLINGS)
        # transformers keeps the projector's epsilon, and not its output width, beside the vision configuration.
        vision_fields.setdefault("text_hidden_size", text_fields["hidden_size"])
        if "projection_layer_norm_eps" in config:
            vision_fields.setdefault("projector_ln_eps", config["projection_layer_norm_eps"])
        merge = vision_fields.get("merge_kernel_size")
        if isinstance(merge, list):
            vision_fields["merge_kernel_size"] = tuple(merge)
        sizes = cls(
            text=TextConfig(**text_fields),
            vision=VisionConfig(**vision_fields),
            **_read_token_ids(config, text),
        )
        return sizes, departures(config)

    @classmethod
    def from_path(cls, path: str | Path) -> K26Config:
        """Read a `config.json`, or the one in a checkpoint's folder.

        Raises ConfigError, and OtherLayoutError as `from_dict`.
        """
        return cls.from_dict(read_config_json(path))


def read_config_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object of a configuration file, or of `config.json` in a folder. Raises ConfigError."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist: give a checkpoint's folder or its config.json.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} is not readable as JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds {type(config).__name__}, expected a JSON object: download it again.")
    return config


# The hub's spelling of each field, which is tried before the field's own name.
_VISION_SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("vt_hidden_size",),
    "num_hidden_layers": ("vt_num_hidden_layers",),
    "num_attention_heads": ("vt_num_attention_heads",),
    "intermediate_size": ("vt_intermediate_size",),
    "pos_emb_height": ("init_pos_emb_height",),
    "pos_emb_width": ("init_pos_emb_width",),
    "pos_emb_time": ("init_pos_emb_time",),
}
_OPTIONAL = {"layer_norm_eps", "projector_ln_eps", "text_hidden_size", "norm_topk_prob", "max_position_embeddings"}
_STRUCTURED = {"rope_scaling", "rope_theta", "quantization"}


def _check_architecture(config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    if architectures is not None and ARCHITECTURE not in architectures:
        _refuse("architectures", architectures, f"[{ARCHITECTURE!r}]")
    if config.get("model_type") not in MODEL_TYPES:
        _refuse("model_type", config.get("model_type"), " or ".join(map(repr, MODEL_TYPES)))


def _pick(
    prefix: str, target: type, config: Mapping[str, Any], spellings: Mapping[str, tuple[str, ...]]
) -> dict[str, Any]:
    """Return the fields of `target` that `config` gives, under any spelling.

    Raises ConfigError for a required field that is missing.
    """
    picked: dict[str, Any] = {}
    for item in fields(target):
        if item.name in _STRUCTURED:
            continue
        for spelling in (*spellings.get(item.name, ()), item.name):
            if config.get(spelling) is not None:
                picked[item.name] = config[spelling]
                break
        else:
            if item.name not in _OPTIONAL:
                _refuse(f"{prefix}.{item.name}", None, "a value")
    return picked


def _read_yarn(text: Mapping[str, Any]) -> YarnConfig:
    """Read the parameters of a YaRN scaling.

    For any other scaling, which `departures` reports, return the published parameters.
    """
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    known = {item.name for item in fields(YarnConfig)}
    given = scaling if is_yarn(scaling) else {}
    return YarnConfig(**{name: value for name, value in given.items() if name in known})


def _read_token_ids(config: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, int]:
    spellings = {
        "bos_token_id": ("bos_token_id",),
        "eos_token_id": ("eos_token_id",),
        "pad_token_id": ("pad_token_id",),
        "media_placeholder_token_id": ("media_placeholder_token_id", "image_token_id"),
    }
    picked: dict[str, int] = {}
    for name, names in spellings.items():
        values = [source[key] for key in names for source in (config, text) if source.get(key) is not None]
        if values:
            value = values[0]
            # Some re-serialized files give the stop tokens as a list.
            picked[name] = value[0] if isinstance(value, list) and value else value
    return picked
