"""Find the form in which a linear layer's weights are stored, and compare it with what the configuration declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from k26_plugins.common.checkpoint.fault import Fault, Problem
from k26_plugins.common.checkpoint.header import HeaderEntry
from k26_plugins.common.checkpoint.table import LANGUAGE_MODEL, TensorSpec
from k26_plugins.common.model.config import PACK_FACTOR
from k26_plugins.common.model.departures import is_quantized, quantization_config

PLAIN = "plain"
_FLOATS = ("BF16", "F16", "F32")
# The form of the weights by the name and the dtype of the part that holds them.
_FORMS = {
    ("weight_packed", "I32"): "pack-quantized",
    ("weight_packed", "U8"): "packed floats",
    ("qweight", "I32"): "qweight",
    ("weight", "F8_E4M3"): "8 bits",
    ("weight", "I8"): "8 bits",
    ("weight", "U8"): "bytes",
}
# The forms that each quantization method may write. A method that is not listed may write any form.
_METHODS = {
    "fp8": {"8 bits"},
    "awq": {"qweight"},
    "gptq": {"qweight"},
    "modelopt": {"8 bits", "bytes"},
    "quark": {"8 bits", "bytes"},
}
_COMPRESSED_TENSORS = {
    "pack-quantized": {"pack-quantized"},
    "float-quantized": {"8 bits"},
    "int-quantized": {"8 bits"},
    "naive-quantized": {"8 bits"},
    "nvfp4-pack-quantized": {"packed floats"},
}
NUM_SHOWN = 3


def is_plain(dtype: str) -> bool:
    """Return whether weights of this dtype (safetensors' name) are floating-point numbers that were not quantized."""
    return dtype in _FLOATS


def form_of(parts: Mapping[str, str]) -> str | None:
    """Return the form of a module's weights by the dtypes of its parts, or None if no part holds weights."""
    for (part, dtype), form in _FORMS.items():
        if parts.get(part) == dtype:
            return form
    return PLAIN if is_plain(parts.get("weight", "")) else None


def contradictions(
    modules: Mapping[str, Mapping[str, HeaderEntry]],
    forms: Mapping[str, str | None],
    table: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    *,
    quantized_elsewhere: bool,
) -> list[Problem]:
    """Return the problems of weights that are stored in another form than the configuration declares.

    modules, forms: the parts and the form of each module, by its name. quantized_elsewhere: a file other than
    config.json describes the quantization.
    """
    quantized = {name: form for name, form in forms.items() if form not in (None, PLAIN)}
    declared = quantization_config(config)
    if not isinstance(declared, Mapping):
        if not quantized or quantized_elsewhere:
            return []
        name = next(iter(quantized))
        return [_contradicts(name, f"is quantized ({quantized[name]}), and config.json has no quantization_config")]
    method, file_format = declared.get("quant_method"), declared.get("format")
    called = f"quantization_config says {method}{f', {file_format}' if file_format else ''}"
    if not quantized:
        return [_contradicts("quantization_config", f"is of {method}, and no weight is quantized")]
    allowed = _METHODS.get(str(method))
    if method == "compressed-tensors":
        allowed = _COMPRESSED_TENSORS.get(str(file_format))
    if allowed is not None:
        for name, form in quantized.items():
            if form not in allowed:
                return [_contradicts(name, f"is stored as {form}, and {called}")]
    if method == "compressed-tensors" and file_format == "pack-quantized":
        return [problem for name in quantized for problem in _packed(name, modules[name], table, declared)][:NUM_SHOWN]
    return []


def _packed(
    module: str, parts: Mapping[str, HeaderEntry], table: Mapping[str, TensorSpec], declared: Mapping[str, Any]
) -> Iterator[Problem]:
    """Compare a packed linear layer with the groups of the quantization's description, as far as these give sizes."""
    matrix = _matrix(module, table)
    groups = [group for group in (declared.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    plain_name = module.removeprefix(LANGUAGE_MODEL)
    covering = [group for group in groups if is_quantized(plain_name, group, declared.get("ignore") or ())]
    if groups and not covering:
        yield _contradicts(module, "is quantized, and quantization_config leaves it out")
    weights = covering[0].get("weights") if len(covering) == 1 else None
    if matrix is None or not isinstance(weights, Mapping):
        return
    rows, inputs = matrix
    bits, group_size = weights.get("num_bits"), weights.get("group_size")
    packed, scale = parts.get("weight_packed"), parts.get("weight_scale")
    if packed is not None and isinstance(bits, int) and 0 < bits <= 32:
        words = -(-inputs // (32 // bits))
        if packed.shape != (rows, words):
            yield _contradicts(packed.name, f"has shape {list(packed.shape)}, and {bits} bits make it {[rows, words]}")
    if scale is not None and isinstance(group_size, int) and group_size > 0:
        scales = inputs // group_size
        if scale.shape != (rows, scales):
            yield _contradicts(
                scale.name, f"has shape {list(scale.shape)}, and groups of {group_size} make it {[rows, scales]}"
            )


def _matrix(module: str, table: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
    """Return the rows and inputs of a linear layer by the table, or None if it has no such layer."""
    if spec := table.get(f"{module}.weight"):
        return (spec.shape[0], spec.shape[1]) if len(spec.shape) == 2 else None
    if spec := table.get(f"{module}.weight_packed"):
        return spec.shape[0], spec.shape[1] * PACK_FACTOR
    return None


def _contradicts(name: str, found: str) -> Problem:
    message = f"{found}: config.json and weights are of two checkpoints, take both from one."
    return Problem(Fault.CONTRADICTION, name, message)
