"""Tests of the weights of a layer's experts in an engine's parameters: they are loaded, served, and updated in whole
and in part. The judge is the float64 product of support/experts.py."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.experts import backends, error, inputs, judge, make_weights, route

from k26_plugins.common.checkpoint import Checkpoint, expert_name
from k26_plugins.common.checkpoint.engine_files import with_mapped_files
from k26_plugins.common.experts import BACKENDS, ExpertsBackend, ExpertsError, ExpertWeights
from k26_plugins.common.experts.base import Expert
from k26_plugins.common.experts.loading import ExpertsOfLayer, Places, load_experts, load_weights
from k26_plugins.common.experts.native.build import variants
from k26_plugins.common.experts.parameters import PACKED_NAMES, LayerExperts
from k26_plugins.common.experts.reference import ReferenceExperts

TOLERANCE = 6e-3
SIZES = EXPERTS, HIDDEN, INNER = 4, 128, 64
X, (IDS, TOPK_WEIGHTS) = inputs(20, HIDDEN), route(20, 2, EXPERTS)


def attach_loader(parameter: Any) -> None:
    """Give a parameter a loader like an engine's, without tensor parallelism."""

    def weight_loader(param: Any, weight: torch.Tensor, name: str, shard_id: str, expert_id: int) -> None:
        target = param.data[expert_id]
        if shard_id != "w2":
            target = target.chunk(2)[shard_id == "w3"]
        target.copy_(weight)

    parameter.weight_loader = weight_loader


def make_layer(backend: str) -> LayerExperts:
    return LayerExperts(torch.nn.Module(), *SIZES, backend, attach_loader)


def load(experts: LayerExperts, weights: ExpertWeights, chosen: range = range(EXPERTS)) -> None:
    """Load as an engine's loader does, one expert's projection at a time."""
    for name, field in zip(PACKED_NAMES, Expert._fields, strict=True):
        for expert in chosen:
            whole = getattr(weights, field)[expert]
            parts = {"w2": whole} if name.startswith("w2") else dict(zip(("w1", "w3"), whole.chunk(2), strict=True))
            for shard_id, part in parts.items():
                parameter: Any = experts.layer.get_parameter(name)
                parameter.weight_loader(parameter, part, name, shard_id=shard_id, expert_id=expert)


def computed(experts: LayerExperts) -> torch.Tensor:
    out = torch.empty_like(X)
    experts.apply(out, X, TOPK_WEIGHTS, IDS)
    return out


def served(experts: LayerExperts) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in experts.layer.named_parameters()}


@pytest.mark.parametrize("backend", backends())
def test_updates_are_computed_with_where_the_old_weights_were(backend: str) -> None:
    """All experts, one, or none are updated. The parameters stay where they are, because a captured graph computes from
    their addresses."""
    experts = make_layer(backend)
    old, new = (make_weights(*SIZES, seed=seed) for seed in (0, 1))
    load(experts, old)
    assert experts.close()
    assert not experts.close()
    assert error(computed(experts), judge(old, X, IDS, TOPK_WEIGHTS)) <= TOLERANCE
    places = served(experts)
    assert len(places) == 4

    assert experts.open()
    assert not experts.open()
    for name, field in zip(PACKED_NAMES, Expert._fields, strict=True):
        assert torch.equal(experts.layer.get_parameter(name), getattr(old, field)), name
    load(experts, new, range(1, 2))
    with pytest.raises(ExpertsError, match="while its weights are loaded"):
        computed(experts)
    experts.close()
    mixed = ExpertWeights(
        *(
            torch.cat((getattr(old, f)[:1], getattr(new, f)[1:2], getattr(old, f)[2:]))
            for f in Expert._fields
        )
    )  # fmt: skip
    assert error(computed(experts), judge(mixed, X, IDS, TOPK_WEIGHTS)) <= TOLERANCE

    for _ in range(2):
        experts.open()
        load(experts, new)
        experts.close()
    assert error(computed(experts), judge(new, X, IDS, TOPK_WEIGHTS)) <= TOLERANCE
    assert served(experts) == places
    before = computed(experts)
    experts.open()
    experts.close()
    assert torch.equal(computed(experts), before)


@pytest.mark.parametrize("backend", backends())
def test_the_parameters_are_the_only_weights(backend: str) -> None:
    """The experts compute with whatever an engine writes into the parameters: EPLB moves rows, and a reload puts other
    parameters in their place."""
    experts = make_layer(backend)
    load(experts, make_weights(*SIZES))
    experts.close()
    layer = experts.layer
    for name, parameter in list(layer.named_parameters()):
        moved = parameter.data.clone()
        moved.view(EXPERTS, -1)[3] = moved.view(EXPERTS, -1)[1]
        parameter.data.fill_(0)
        layer.register_parameter(name, torch.nn.Parameter(moved, requires_grad=False))
    ones, out = torch.ones(len(X), 1), [torch.empty_like(X) for _ in range(2)]
    for result, expert in zip(out, (3, 1), strict=True):
        experts.apply(result, X, ones, torch.full((len(X), 1), expert, dtype=torch.int32))
    assert torch.equal(*out)
    assert out[0].float().norm() > 0


class Keeps(ReferenceExperts):
    """A backend that stands in for kt-kernel: it copies the weights and gives none of them out."""

    name = "keeps"

    @classmethod
    def load(cls, weights: ExpertWeights) -> Keeps:
        return cls(weights.copy_of(list(range(weights.num_experts))))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}


@pytest.fixture
def keeps(monkeypatch: pytest.MonkeyPatch) -> type[ExpertsBackend]:
    monkeypatch.setitem(BACKENDS, "keeps", Keeps)
    return Keeps


@pytest.mark.skipif(not variants(), reason="this CPU has no instruction set of the native experts")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
def test_new_memory_is_made_of_huge_pages() -> None:
    """New memory is made of huge pages before anything is loaded, because putting small pages together afterwards takes
    longer than reading the weights."""
    experts = LayerExperts(torch.nn.Module(), 2, 2048, 2048, "native", attach_loader)
    middle = experts.layer.get_parameter("w13_weight_packed").data[1].data_ptr()
    regions = re.findall(r"(?ms)^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: ([^\n]*)$", Path("/proc/self/smaps").read_text())
    flags = next(flags for begin, end, flags in regions if int(begin, 16) <= middle < int(end, 16))
    assert "hg" in flags.split()


@pytest.mark.usefixtures("keeps")
def test_a_backend_that_keeps_its_weights_takes_whole_updates() -> None:
    experts = make_layer("keeps")
    old, new = (make_weights(*SIZES, seed=seed) for seed in (0, 1))
    load(experts, old)
    experts.close()
    assert error(computed(experts), judge(old, X, IDS, TOPK_WEIGHTS)) <= TOLERANCE
    experts.open()
    load(experts, new)
    experts.close()
    assert error(computed(experts), judge(new, X, IDS, TOPK_WEIGHTS)) <= TOLERANCE
    experts.open()
    load(experts, new, range(3))
    with pytest.raises(
        ExpertsError, match="the update lacks 6 tensors of a layer's experts, and keeps keeps its weights"
    ):
        experts.close()


def whole_layer(experts: LayerExperts, *, by_copy: bool = True) -> ExpertsOfLayer:
    """Return a layer as an engine without expert parallelism has it."""
    places = Places([experts], lambda expert: [(0, expert)], 0, 1) if by_copy else None
    return ExpertsOfLayer(
        experts.layer, experts, experts.open, experts.close, lambda expert: (expert,), lambda expert: True, places
    )


@pytest.mark.parametrize("by_copy", [True, False])
def test_tensors_reach_their_places_by_name(tiny_folder: Path, *, by_copy: bool) -> None:
    """A layer that serves is opened for an update and closed again, and a layer that was open before stays open. All
    tensors that are no experts' are passed on."""
    checkpoint = Checkpoint(tiny_folder)
    text = checkpoint.config.text
    layers = {number: layer_of(checkpoint) for number in (1, 2)}
    found = {number: whole_layer(experts, by_copy=by_copy) for number, experts in layers.items()}
    names = list(checkpoint.table)
    weights = ((name, checkpoint.tensor(name)) for name in names)
    others = [name for name, _ in load_experts(weights, checkpoint.config, found)]
    assert others == [name for name in names if ".experts." not in name]
    for number, experts in layers.items():
        assert experts.is_open
        experts.close()
        for expert in (0, text.n_routed_experts - 1):
            gate, up, down = (
                checkpoint.tensor(expert_name(number, expert, projection, "packed"))
                for projection in ("gate", "up", "down")
            )
            assert torch.equal(experts.tensors()["w13_packed"][expert], torch.cat((gate, up)))
            assert torch.equal(experts.tensors()["w2_packed"][expert], down)

    name = expert_name(1, 3, "up", "packed")

    def update() -> Iterator[tuple[str, torch.Tensor]]:
        yield name, torch.zeros_like(checkpoint.tensor(name))
        assert layers[1].is_open
        yield "model.another", torch.zeros(1)

    assert [name for name, _ in load_experts(update(), checkpoint.config, found)] == ["model.another"]
    assert not layers[1].is_open
    assert not layers[1].tensors()["w13_packed"][3].chunk(2)[1].any()
    assert layers[1].tensors()["w13_packed"][3].chunk(2)[0].any()


def test_what_is_no_experts_is_the_engines_to_load(tiny_folder: Path) -> None:
    """Without layers of the core's, the engine loads every tensor. If the engine's loading fails, the core's layers are
    closed again and serve on."""
    checkpoint = Checkpoint(tiny_folder)
    names = [name for name, spec in checkpoint.table.items() if spec.layer == 1]
    experts = layer_of(checkpoint)
    layers = {1: whole_layer(experts)}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, checkpoint.tensor(name)) for name in names)

    def named(given: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        return [name for name, _ in given]

    assert load_weights(weights(), None, {}, named) == names
    others = load_weights(weights(), checkpoint.config, layers, named)
    assert others == [name for name in names if ".experts." not in name]
    experts.close()

    def fails(given: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, _ in given:
            if name == "model.another":
                raise KeyError(name)

    expert = next(name for name in names if name.endswith("experts.0.up_proj.weight_packed"))
    update = [(expert, checkpoint.tensor(expert)), ("model.another", torch.zeros(1))]
    with pytest.raises(KeyError, match=r"model\.another"):
        load_weights(update, checkpoint.config, layers, fails)
    assert not experts.is_open


def test_a_rank_takes_its_part_of_the_experts_that_it_keeps(tiny_folder: Path) -> None:
    """The rank is 1 of 2 and keeps even experts, in another order and one of them twice."""
    checkpoint = Checkpoint(tiny_folder)
    text = checkpoint.config.text
    kept = [4, 0, 2, 4]
    inner = text.moe_intermediate_size // 2
    sizes = (len(kept), text.hidden_size, inner)

    def refuse(parameter: Any) -> None:
        parameter.weight_loader = None

    rank = LayerExperts(torch.nn.Module(), *sizes, "reference", refuse)

    def slots(expert: int) -> list[tuple[int, int]]:
        return [(0, slot) for slot, one in enumerate(kept) if one == expert]

    layer = whole_layer(rank)._replace(places=Places([rank], slots, 1, 2))
    weights = ((name, checkpoint.tensor(name)) for name, spec in checkpoint.table.items() if spec.layer == 1)
    for _ in load_experts(weights, checkpoint.config, {1: layer}):
        pass
    parameters = dict(rank.layer.named_parameters())
    for slot, expert in enumerate(kept):
        for part in ("packed", "scale"):
            gate, up, down = (
                checkpoint.tensor(expert_name(1, expert, projection, part)) for projection in ("gate", "up", "down")
            )
            assert torch.equal(parameters[f"w13_weight_{part}"][slot], torch.cat((gate[inner:], up[inner:])))
            assert torch.equal(parameters[f"w2_weight_{part}"][slot], down[:, down.shape[1] // 2 :])


def test_another_loader_of_a_parameter_is_given_the_tensors(tiny_folder: Path) -> None:
    """An engine that reloads a layer puts a loader of its own on a parameter. That loader is given this parameter's
    tensors and no others."""
    checkpoint = Checkpoint(tiny_folder)
    experts = layer_of(checkpoint)
    given: list[tuple[str, str, int, torch.Tensor]] = []

    def load(param: Any, weight: torch.Tensor, name: str, shard_id: str, expert_id: int) -> None:
        given.append((name, shard_id, expert_id, weight))

    parameter: Any = experts.layer.get_parameter("w13_weight_packed")
    parameter.data.zero_()
    parameter.weight_loader = load
    weights = [(name, checkpoint.tensor(name)) for name, spec in checkpoint.table.items() if spec.layer == 1]
    for _ in load_experts(weights, checkpoint.config, {1: whole_layer(experts)}):
        pass
    assert not parameter.any()
    assert len(given) == 2 * checkpoint.config.text.n_routed_experts
    assert {name for name, *_ in given} == {"experts.w13_weight_packed"}
    for _, shard_id, expert, tensor in given:
        projection = {"w1": "gate", "w3": "up"}[shard_id]
        assert torch.equal(tensor, checkpoint.tensor(expert_name(1, expert, projection, "packed")))
    expected = checkpoint.tensor(expert_name(1, 3, "down", "packed"))
    assert torch.equal(experts.layer.get_parameter("w2_weight_packed")[3], expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_layer_is_repacked_while_others_are_still_to_come(tiny_folder: Path, backend: str) -> None:
    """A load of the whole checkpoint closes a layer when its last tensor has arrived; after any other load the engine
    closes it."""
    checkpoint = Checkpoint(tiny_folder)
    layers = {number: layer_of(checkpoint, backend) for number in (1, 2)}
    found = {number: whole_layer(experts) for number, experts in layers.items()}
    names = [name for number in layers for name, spec in checkpoint.table.items() if spec.layer == number]
    last = max(index for index, name in enumerate(names) if checkpoint.table[name].layer == 1 and ".experts." in name)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for index, name in enumerate(names):
            yield name, checkpoint.tensor(name)
            patience = time.monotonic() + 60
            while index == last and layers[1].is_open:
                assert time.monotonic() < patience, "the layer is left open"
                time.sleep(0.01)
            assert index < last or not layers[1].is_open

    def load_whole() -> None:
        whole = with_mapped_files(weights(), checkpoint.config)
        assert not [name for name, _ in load_experts(whole, checkpoint.config, found) if ".experts." in name]

    load_whole()
    with torch.inference_mode():  # SGLang updates weights in this mode
        for experts in layers.values():
            experts.open()
        load_whole()
    for number, experts in layers.items():
        assert not experts.is_open
        experts.open()
        expected = checkpoint.tensor(expert_name(number, 0, "down", "packed"))
        assert torch.equal(experts.layer.get_parameter("w2_weight_packed")[0], expected)


def test_what_repacking_refuses_ends_the_load(tiny_folder: Path) -> None:
    checkpoint = Checkpoint(tiny_folder)
    layers = {1: whole_layer(layer_of(checkpoint))}

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, spec in checkpoint.table.items():
            if spec.layer == 1:
                tensor = checkpoint.tensor(name)
                yield name, torch.full_like(tensor, torch.nan) if name.endswith("weight_scale") else tensor

    whole = with_mapped_files(weights(), checkpoint.config)
    with pytest.raises(ExpertsError, match="failed the self-test"):
        list(load_experts(whole, checkpoint.config, layers))


def layer_of(checkpoint: Checkpoint, backend: str = "reference") -> LayerExperts:
    text = checkpoint.config.text
    sizes = (text.n_routed_experts, text.hidden_size, text.moe_intermediate_size)
    return LayerExperts(torch.nn.Module(), *sizes, backend, attach_loader)
