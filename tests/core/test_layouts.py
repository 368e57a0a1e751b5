"""Tests that a checkpoint is classified as the published layout, another layout of this architecture or a saved state,
or is refused with an error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.layouts import (
    EXPERT,
    INDEX,
    OTHER,
    PUBLISHED,
    Change,
    Draft,
    as_published,
    awq,
    beside_the_shards,
    bf16,
    block_fp8,
    int4_attention,
    make,
    mtp_layer,
    nvfp4,
)

from k26_plugins.common.checkpoint import (
    Checkpoint,
    CheckpointError,
    Layout,
    StreamedCheckpoint,
    check,
    classify,
    classify_folder,
    fingerprint,
    local_folder,
    weights_folder,
)
from k26_plugins.common.model.config import K26Config, OtherLayoutError, read_config_json

INT4 = "language_model.model.layers.1.mlp.experts.3.gate_proj"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_layout(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    folder = make(PUBLISHED[name], tiny_folder, tmp_path / "made")
    answer = classify_folder(folder)
    assert answer.layout is Layout.PUBLISHED
    assert answer.reasons == ()
    assert answer.config == K26Config.from_path(folder)
    assert check(folder).problems == []


@pytest.mark.parametrize("name", OTHER)
def test_another_layout_says_why(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    layout, reason = OTHER[name]
    folder = make(layout, tiny_folder, tmp_path / "made")
    answer = classify_folder(folder)
    assert answer.layout is Layout.OTHER
    assert reason in answer.reason, answer.reasons
    assert "\n" not in answer.reason


@pytest.mark.parametrize("name", ["INT4 attention", "FP8 KV scales", "an MTP layer", "NVFP4 by modelopt", "bf16"])
def test_the_weights_tell_it_where_the_configuration_does_not(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    """If the headers hold another layout and config.json describes the published one, the folder is classified by its
    headers or refused with an error that names config.json."""
    folder = make(OTHER[name][0], tiny_folder, tmp_path / "made")
    (folder / "config.json").write_text((tiny_folder / "config.json").read_text())
    if name == "FP8 KV scales":
        assert "self_attn.k_scale is F32" in classify_folder(folder).reason
    else:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            classify_folder(folder)


@pytest.mark.parametrize("name", [name for name in OTHER if name not in ("sharded_state", "GGUF")])
def test_a_name_on_the_hub_is_judged_by_its_configuration(tiny_folder: Path, name: str) -> None:
    draft = Draft(tiny_folder)
    OTHER[name][0](draft)
    assert classify(draft.config, None).layout is Layout.OTHER
    with pytest.raises(OtherLayoutError):
        K26Config.from_dict(draft.config)


def test_a_snapshot_in_the_hub_s_cache(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is made of links to blobs; one that is still being downloaded is not called damaged."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_folder.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(repository / "blobs" / str(number), snapshot))
    assert local_folder("org/tiny") == snapshot
    assert classify_folder(snapshot).layout is Layout.PUBLISHED
    next(snapshot.glob("model-*")).unlink()
    assert local_folder("org/tiny") is None
    assert local_folder("org/unknown") is None


def _drop(name: str) -> Change:
    return lambda draft: draft.tensors.pop(name)


def _after(layout: Change, then: Change) -> Change:
    def both(draft: Draft) -> None:
        layout(draft)
        then(draft)

    return both


def _half(draft: Draft) -> None:
    draft.tensors[f"{EXPERT}.weight_scale"] = draft.tensors[f"{EXPERT}.weight_scale"].half()


def _wrong_group(draft: Draft) -> None:
    draft.quantization["config_groups"]["group_0"]["weights"]["group_size"] = 64


def _text(**values: object) -> Change:
    return lambda draft: draft.text.update(values)


def _index_of_more(draft: Draft) -> None:
    beside_the_shards(draft)
    index = {"weight_map": {**dict.fromkeys(draft.tensors, "model.safetensors"), "x": "model-2.safetensors"}}
    draft.files[INDEX] = lambda file: file.write_text(json.dumps(index))


def _truncated(draft: Draft) -> None:
    draft.files["model.safetensors"] = lambda file: file.write_bytes(file.read_bytes()[:-100])


def _one_of_three(draft: Draft) -> None:
    target = "model-00001-of-000003.safetensors"
    draft.files[target] = lambda file: file.with_name("model.safetensors").rename(file)


def _cut_to(layout: Change, declared: dict[str, object]) -> Change:
    def both(draft: Draft) -> None:
        layout(draft)
        draft.text.pop("quantization_config", None)
        draft.config["quantization_config"] = declared

    return both


AWQ = {"quant_method": "awq", "bits": 4}
DAMAGED: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (_drop(f"{EXPERT}.weight_packed"), f"missing: {EXPERT}.weight_packed"),
    "lm_head is missing": (_drop("language_model.lm_head.weight"), "missing: language_model.lm_head.weight"),
    "one scale in float16": (_half, f"wrong dtype: {EXPERT}.weight_scale has dtype F16, expected BF16"),
    "a stray tensor": (
        lambda draft: draft.tensors.update({"model.rotary.inv_freq": torch.zeros(4)}),
        "extra: model.rotary.inv_freq",
    ),
    "a file is cut off": (_truncated, "truncated: "),
    "a file of the index is missing": (_index_of_more, "missing file: model-2.safetensors"),
    "a file of several is missing": (_one_of_three, "missing file: model-00002-of-000003.safetensors"),
    "another width": (_text(moe_intermediate_size=96), "config.json and weights are of two models"),
    "another number of experts": (_text(n_routed_experts=6), "beyond the layers or experts of config.json"),
    "more experts than there are": (_text(n_routed_experts=9), "missing: "),
    "another number of layers": (_text(num_hidden_layers=2), "beyond the layers or experts of config.json"),
    "bf16 that says INT4": (
        _after(bf16, lambda draft: draft.text.update(quantization_config=Draft(draft.source).quantization)),
        "no weight is quantized",
    ),
    "INT4 that says nothing": (lambda draft: draft.text.pop("quantization_config"), "no quantization_config"),
    "INT4 that says AWQ": (_cut_to(as_published, AWQ), "is stored as pack-quantized, and quantization_config says awq"),
    "FP8 that says AWQ": (_cut_to(block_fp8, AWQ), "is stored as 8 bits"),
    "another group size than it says": (_wrong_group, "groups of 64 make it"),
    "INT4 attention that it ignores": (
        _after(int4_attention, lambda draft: draft.quantization["ignore"].append("re:.*self_attn.*")),
        "quantization_config leaves it out",
    ),
    "NVFP4 without an expert's weights": (_after(nvfp4, _drop(f"{INT4}.weight")), f"such as {INT4}"),
    "AWQ without an expert": (
        _after(awq, lambda draft: [draft.tensors.pop(f"{INT4}.{part}") for part in ("qweight", "qzeros", "scales")]),
        f"such as {INT4}",
    ),
    "an MTP model without a layer's norm": (
        _after(mtp_layer, _drop("language_model.model.layers.1.input_layernorm.weight")),
        "missing: language_model.model.layers.1.input_layernorm.weight",
    ),
    "bf16 of another width": (_after(bf16, _text(kv_lora_rank=256)), "config.json and weights are of two models"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_and_contradictions_are_one_error(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGED[name]
    folder = make(damage, tiny_folder, tmp_path / "made")
    with pytest.raises(CheckpointError) as raised:
        classify_folder(folder)
    assert message in str(raised.value)


def test_int64_shapes_are_read_as_the_published_ones(tiny_folder: Path, tmp_path: Path) -> None:
    folder = make(PUBLISHED["int64 shapes"], tiny_folder, tmp_path / "made")
    name = f"{EXPERT}.weight_shape"
    expected = Checkpoint(tiny_folder).tensor(name)
    assert torch.equal(Checkpoint(folder).tensor(name), expected)
    with StreamedCheckpoint(folder) as streamed, StreamedCheckpoint(tiny_folder) as published:
        assert torch.equal(streamed.tensor(name), expected)
        assert streamed.tensor(name).dtype == torch.int32
        assert fingerprint(streamed) == fingerprint(published)


Parts = dict[str, torch.Tensor]
LAYER = "language_model.model.layers.1.mlp.experts.routed_experts"


def _experts(config: K26Config, ranks: int = 1) -> Parts:
    """Return a layer's parameters as `LayerExperts` has them while it is open."""
    text = config.text
    experts, hidden, inner = text.n_routed_experts, text.hidden_size, text.moe_intermediate_size // ranks
    return {
        "w13_weight_packed": torch.zeros(experts, 2 * inner, hidden // 8, dtype=torch.int32),
        "w13_weight_scale": torch.zeros(experts, 2 * inner, hidden // 32, dtype=torch.bfloat16),
        "w2_weight_packed": torch.zeros(experts, hidden, inner // 8, dtype=torch.int32),
        "w2_weight_scale": torch.zeros(experts, hidden, inner // 32, dtype=torch.bfloat16),
    }


def _with_shapes(parts: Parts) -> Parts:
    """Add the tensors of shapes that both engines' own experts keep, whatever layout they gave the other parts."""
    shapes = torch.zeros(len(parts["w13_weight_packed"]), 2)
    return {**parts, "w13_weight_shape": shapes, "w2_weight_shape": shapes.clone()}


def _transposed(parts: Parts) -> Parts:
    """Transpose the parts to Marlin's layout, in which the inputs come first."""
    return {name: tensor.transpose(1, 2).contiguous() for name, tensor in parts.items()}


def _bytes(parts: Parts) -> Parts:
    """View the packed weights as the bytes that vLLM's Triton kernel takes."""
    return {name: tensor.view(torch.uint8) if name.endswith("packed") else tensor for name, tensor in parts.items()}


def _save(tiny_folder: Path, folder: Path, *files: str, parts: Parts) -> Path:
    """Save a state of these files, each with the same layer, beside the small files of the checkpoint and its index."""
    folder.mkdir()
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    for name in files:
        save_file({f"{LAYER}.{part}": tensor for part, tensor in parts.items()}, folder / name)
    return folder


@pytest.mark.parametrize("name", ["model-rank-{}-part-0.safetensors", "model-pp-0-tp-{}-part-0.safetensors"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_state_saved_with_the_cores_experts(tiny_folder: Path, tmp_path: Path, name: str, ranks: int) -> None:
    config = K26Config.from_path(tiny_folder)
    files = [name.format(rank) for rank in range(ranks)]
    folder = _save(tiny_folder, tmp_path / "saved", *files, parts=_experts(config, ranks))
    assert weights_folder(folder) == folder
    answer = classify_folder(folder)
    assert answer.layout is Layout.SAVED
    assert answer.config == config
    assert files[0] in answer.reason
    report = check(folder)
    assert not report.problems
    assert report.num_tensors == 4 * ranks
    (folder / files[-1]).write_bytes((folder / files[-1]).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated: "):
        classify_folder(folder)


@pytest.mark.parametrize("change", [_with_shapes, _transposed, _bytes, lambda parts: {"norm": torch.zeros(2)}])
def test_a_state_saved_with_an_engines_own_experts(
    tiny_folder: Path, tmp_path: Path, change: Callable[[Parts], Parts]
) -> None:
    parts = change(_experts(K26Config.from_path(tiny_folder)))
    folder = _save(tiny_folder, tmp_path / "saved", "model-rank-0-part-0.safetensors", parts=parts)
    assert classify_folder(folder).layout is Layout.OTHER


def test_a_state_saved_beside_the_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    """The files that the index names are the checkpoint, which is taken before the state. A state of another layout is
    left to the engine, whether the core's or the engine's experts saved it."""
    parts = _experts(K26Config.from_path(tiny_folder))
    folder = _save(tiny_folder, tmp_path / "saved", "model-rank-0-part-0.safetensors", parts=parts)
    config = read_config_json(folder)
    config["text_config"]["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    assert classify(config, folder).layout is Layout.OTHER
    for file in tiny_folder.glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert classify_folder(folder).layout is Layout.PUBLISHED
