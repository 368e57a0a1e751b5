"""Tell another layout of this architecture from a damaged checkpoint, tensor by tensor.

A *module* is a tensor's name without its last component; the last components are the module's *parts* (`weight`,
`weight_scale`, …). A *kind* is a module without the numbers of its layer, block and expert. A quantizer changes every
module of a kind, or its configuration says which modules it left alone. A broken download does neither.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from k26_plugins.common.checkpoint.fault import Fault, Problem, compare, extra, missing
from k26_plugins.common.checkpoint.header import HeaderEntry
from k26_plugins.common.checkpoint.stored_form import PLAIN, contradictions, form_of
from k26_plugins.common.checkpoint.table import TensorSpec
from k26_plugins.common.model.config import K26Config

_NUMBERS = re.compile(r"\b(layers|blocks|experts)\.\d+")

Modules = dict[str, dict[str, HeaderEntry]]


def examine(
    entries: Mapping[str, HeaderEntry],
    config: Mapping[str, Any],
    sizes: K26Config,
    table: Mapping[str, TensorSpec],
    departures: list[str],
    *,
    quantized_elsewhere: bool,
) -> tuple[list[Problem], list[str]]:
    """Return the faults of the tensors, and their departures from the published layout.

    Both are empty for the published layout. table: the tensor table of `sizes`. departures: those of the configuration.
    quantized_elsewhere: a file other than config.json describes the quantization.
    """
    if entries.keys() == table.keys():
        problems = [one for entry in entries.values() if (one := _compare(entry, table.get(entry.name)))]
        if not problems and not departures:
            return [], []
    modules = _by_module(entries)
    expected = _by_module(table)
    problems, reasons = [], []
    for found_problems, found_reasons in (
        _lost(modules, expected),
        _converted(modules, expected, bool(departures)),
        _extra(modules, expected, sizes, config, bool(departures)),
    ):
        problems += found_problems
        reasons += found_reasons
    forms = {name: form_of({part: entry.dtype for part, entry in parts.items()}) for name, parts in modules.items()}
    if not problems:
        problems = contradictions(modules, forms, table, config, quantized_elsewhere=quantized_elsewhere)
    return problems, reasons


def kind_of(name: str) -> str:
    """Return the name with `*` for the numbers of layers, blocks and experts, the same for all tensors of a kind."""
    return _NUMBERS.sub(r"\1.*", name)


def _compare(entry: HeaderEntry, spec: TensorSpec | None) -> Problem | None:
    if spec is not None and entry.shape == spec.shape and entry.dtype == spec.dtype:
        return None  # the quick answer for nearly all of 208,550 tensors
    return compare(entry.name, entry.shape, entry.dtype, spec)


def _by_module(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, entry in entries.items():
        module, _, part = name.rpartition(".")
        modules[module][part] = entry
    return modules


def _lost(modules: Modules, expected: Mapping[str, Mapping[str, TensorSpec]]) -> tuple[list[Problem], list[str]]:
    """Return the faults and the departures of tensors in the table that the checkpoint lacks.

    If every module of a kind lacks the tensor, and the checkpoint has modules that the table does not know, this is
    another layout.
    """
    lost: dict[str, list[TensorSpec]] = defaultdict(list)
    total: Counter[str] = Counter()
    for module, specs in expected.items():
        parts = modules.get(module, {})
        # A module with other parts in place of the expected ones is stored in another form; `_converted` handles it.
        stands_in = bool(parts.keys() - specs.keys()) and form_of({p: e.dtype for p, e in parts.items()}) is not None
        for spec in specs.values():
            total[kind_of(spec.name)] += 1
            if spec.name.rpartition(".")[2] not in parts and not stands_in:
                lost[kind_of(spec.name)].append(spec)
    unknown = any(module not in expected for module in modules)
    problems, reasons = [], []
    for kind, absent in lost.items():
        if len(absent) == total[kind] and unknown:
            reasons.append(f"there is no {kind}")
        else:
            problems += [missing(spec) for spec in absent]
    return problems, reasons


def _converted(
    modules: Modules,
    expected: Mapping[str, Mapping[str, TensorSpec]],
    departs: bool,
) -> tuple[list[Problem], list[str]]:
    """Return the faults and the departures of tensors that are stored differently.

    These are tensors with another shape or dtype than the table's, and modules that are stored in another form.
    """
    dtypes: dict[str, list[Problem]] = defaultdict(list)
    total: Counter[str] = Counter()
    problems: list[Problem] = []
    reasons: dict[str, None] = {}
    for module, specs in expected.items():
        parts = modules.get(module, {})
        added = sorted(parts.keys() - specs.keys())
        plain = form_of({name: entry.dtype for name, entry in parts.items()}) == PLAIN
        if added:
            reasons.setdefault(f"{kind_of(f'{module}.{added[0]}')} is {parts[added[0]].dtype}, which the model has not")
        for part, spec in specs.items():
            entry = parts.get(part)
            if entry is None:
                continue
            total[kind_of(spec.name)] += 1
            problem = _compare(entry, spec)
            if problem is None:
                continue
            # If the configuration declares another quantization, a quantized weight may have another shape.
            if problem.fault is Fault.WRONG_SHAPE and not added and (plain or not departs):
                problems.append(problem)
            elif problem.fault is Fault.WRONG_DTYPE and not added:
                dtypes[kind_of(spec.name)].append(problem)
            else:
                reasons.setdefault(f"{kind_of(entry.name)} is {entry.dtype} {list(entry.shape)}")
    for kind, deviating in dtypes.items():
        if len(deviating) == total[kind] or departs:
            entry = modules[deviating[0].name.rpartition(".")[0]][deviating[0].name.rpartition(".")[2]]
            reasons.setdefault(f"{kind} is {entry.dtype}")
        else:
            problems += deviating
    return problems, list(reasons)


def _extra(
    modules: Modules,
    expected: Mapping[str, Mapping[str, TensorSpec]],
    sizes: K26Config,
    config: Mapping[str, Any],
    departs: bool,
) -> tuple[list[Problem], list[str]]:
    """Return the faults and the departures of modules that the table does not have.

    Such a module is one more layer or expert than the configuration says, or one of another kind.
    """
    kinds = {kind_of(module) for module in expected}
    unknown: dict[str, list[str]] = defaultdict(list)
    problems: list[Problem] = []
    draft_layers = config["text_config"].get("num_nextn_predict_layers") or 0
    layers = sizes.text.num_hidden_layers
    drafts = tuple(f"language_model.model.layers.{layers + index}." for index in range(draft_layers))
    for module in sorted(modules.keys() - expected.keys()):
        if module.startswith(drafts):
            continue
        if kind_of(module) in kinds:
            problems += list(_more_than_configured(modules[module]))
        else:
            unknown[kind_of(module)].append(module)
    reasons = []
    per_layer = {layers, layers - sizes.text.first_k_dense_replace, sizes.vision.num_hidden_layers}
    for kind, names in sorted(unknown.items()):
        if departs or len(names) in per_layer or "experts.*" in kind:
            part, entry = next(iter(modules[names[0]].items()))
            reasons.append(f"{kind}.{part} is {entry.dtype}, which the model has not")
        else:
            problems += [extra(entry.name) for name in names for entry in modules[name].values()]
    return problems, reasons


def _more_than_configured(parts: Mapping[str, HeaderEntry]) -> Iterator[Problem]:
    for entry in parts.values():
        message = "is beyond the layers or experts of config.json, which is of another model than the weights."
        yield Problem(Fault.EXTRA, entry.name, message)
