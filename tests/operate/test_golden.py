"""Tests of golden files against the reference model, which tests/core holds to transformers, of the memory that a run
takes, and of a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.agreement import divergence
from support.quick import make_quick

from k26_plugins.cli import app
from k26_plugins.common.checkpoint import Checkpoint, tensor_table
from k26_plugins.common.model.config import K26Config
from k26_plugins.common.model.int4 import dequantize, gemm_tiled, quantize
from k26_plugins.common.reference.kimi_k26 import KimiK26
from k26_plugins.common.tiny.checkpoint import TinySizes
from k26_plugins.operate.golden import Golden, memory, read_prompts
from k26_plugins.operate.golden.prompts import pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_streamed_give_the_reference(
    tiny_folder: Path, prompts_file: Path, golden_file: Path, dtype: torch.dtype
) -> None:
    """The judge is one whole pass of the mapped model over prompt and answer, in float32 and, for the bf16
    baseline, in bfloat16."""
    model = KimiK26(Checkpoint(tiny_folder), dtype)
    for prompt, found in zip(read_prompts(prompts_file, tiny_folder), Golden.load(golden_file).prompts, strict=True):
        token_ids = torch.tensor(found.token_ids)
        assert token_ids[: found.num_prompt_tokens].tolist() == prompt.token_ids
        media = pixels(prompt, tiny_folder)[:2] if prompt.images else ()
        logprobs = model.logprobs(token_ids[:-1], *media)
        kept = found.top_logprobs if dtype == torch.float32 else found.baseline_logprobs
        difference = (logprobs.gather(1, found.top_ids) - kept).abs().amax(-1)
        if dtype == torch.float32:
            assert difference.max() < 1e-4
            assert torch.equal(logprobs.topk(64).indices[:, 0], found.top_ids[:, 0])
            following = logprobs.gather(1, token_ids[1:, None])[:, 0]
            torch.testing.assert_close(found.next_logprobs, following, rtol=0, atol=1e-4)
            answer = token_ids[found.num_prompt_tokens :].tolist()
            assert answer == logprobs.argmax(-1)[found.num_prompt_tokens - 1 :].tolist()
        else:
            # Sums in another order round otherwise, so that a few positions choose other experts.
            assert difference.median() < 0.02


def test_the_baselines_divergence_is_over_the_whole_vocabulary(tiny_folder: Path, golden_file: Path) -> None:
    found = Golden.load(golden_file).prompts[1]
    token_ids = torch.tensor(found.token_ids[:-1])
    exact, rounded = (
        KimiK26(Checkpoint(tiny_folder), dtype).logprobs(token_ids) for dtype in (torch.float32, torch.bfloat16)
    )
    kl = divergence(rounded, exact)
    assert found.baseline_kl.median() == pytest.approx(kl.median().item(), rel=0.2)


def test_experts_are_those_that_the_router_chose(tiny_folder: Path, golden_file: Path) -> None:
    """A prompt's first token sees nothing but itself, so its experts are those that the reference chooses for it
    alone."""
    model = KimiK26(Checkpoint(tiny_folder), torch.float32)
    for found in Golden.load(golden_file).prompts:
        # Both MoE layers have the two experts that are chosen and the next four.
        assert found.experts.shape == found.gaps.shape == (len(found.top_ids), 2, 6)
        assert torch.equal(
            found.gaps >= 0, torch.tensor([True, True, False, False, False, False]).expand(found.gaps.shape)
        )
        token = torch.tensor(found.token_ids[:1])
        chosen: list[torch.Tensor] = []
        layer: Any = type(model.text.layers[1].mlp)

        def spy(moe: Any, x: torch.Tensor, choose: Any = layer.choose, chosen: list[torch.Tensor] = chosen) -> Any:
            result = choose(moe, x)
            chosen.append(result[1])
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "choose", spy)
            model.logprobs(token)
        assert [set(ids[0].tolist()) for ids in chosen] == [set(row[:2].tolist()) for row in found.experts[0]]


def test_the_file_names_weights_and_holds_images(tiny_folder: Path, prompts_file: Path, golden_file: Path) -> None:
    golden = Golden.load(golden_file)
    assert golden.info["fingerprint"].startswith("sha256:")
    assert golden.prompts[2].images == [prompts_file.with_name("photo.png").read_bytes()]
    assert golden.prompts[2].token_ids.count(golden.info["media_placeholder_token_id"]) == 4 * 3
    assert golden.prompts[3].text.endswith("<think></think>")


def test_the_tiled_product_is_the_plain_one() -> None:
    """The product is right although the weight's rows end within a tile."""
    generator = torch.Generator().manual_seed(0)
    packed, scale = quantize(torch.randn(200, 96, generator=generator))
    x = torch.randn(5, 96, generator=generator)
    expected = x.double() @ dequantize(packed, scale, torch.float64).T
    torch.testing.assert_close(gemm_tiled(x, packed, scale).double(), expected, rtol=1e-5, atol=1e-5)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from k26_plugins.common.checkpoint import StreamedCheckpoint
from k26_plugins.operate.golden import GoldenJob, memory, read_prompts

folder, prompts, out = map(Path, sys.argv[1:4])
memory.SCRATCH = 16 * 2**20
torch.ones(64, 64) @ torch.ones(64, 64)
with StreamedCheckpoint(folder) as checkpoint:
    job = GoldenJob(checkpoint, read_prompts(prompts, folder), out, 20, 2)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + job.peak_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(job.peak_bytes, flush=True)
    job.run(lambda done: print("step", done, flush=True))
"""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    sizes = TinySizes(layers=3, experts=34, hidden_size=2048, moe_intermediate_size=1024, vision_layers=1)
    make_quick(folder, sizes)
    return folder


def test_a_checkpoint_larger_than_the_memory_allowed_killed_and_resumed(wide_folder: Path, tmp_path: Path) -> None:
    """The run may write to no more memory than it said it would. After it was killed in the middle, it goes on and
    writes the same bytes."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "Layers come one by one, and experts when a token wants them."}\n{"text": "Hi"}\n')
    command = [sys.executable, "-c", LIMITED, str(wide_folder), str(prompts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(
        [*command, str(tmp_path / "whole")], env=environment, capture_output=True, text=True, check=True
    )
    allowed = int(whole.stdout.split()[0])
    assert sum(spec.num_bytes for spec in tensor_table(K26Config.from_path(wide_folder)).values()) > allowed

    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert not (tmp_path / "killed").exists()
    resumed = subprocess.run(
        [*command, str(tmp_path / "killed")], env=environment, capture_output=True, text=True, check=True
    )
    assert resumed.stdout.split("\n")[1:-1] == ["step 3", "step 6", "step 6"]  # the first pass is only read
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not (tmp_path / "killed.state").exists()


def test_a_state_of_other_inputs_is_refused(tiny_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "golden"
    (tmp_path / "golden.state").mkdir()
    (tmp_path / "golden.state" / "run.json").write_text(json.dumps({"identity": "another"}))
    result = CliRunner().invoke(app, ["golden", str(tiny_folder), "--prompts", str(prompts_file), "--out", str(out)])
    assert result.exit_code == 1
    assert "other prompts, options or weights" in result.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"id": "a"}', "either `messages` or `text`"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}]}', "gone.png"),
        ('{"text": ""}', "either `messages` or `text`"),
        ("", "no prompt"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "an id twice"),
    ],
)
def test_bad_prompts_are_named(tiny_folder: Path, tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    command = ["golden", str(tiny_folder), "--prompts", str(file), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in result.output


def test_another_file_is_no_golden_file(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for file in (tmp_path / "text", next(tiny_folder.glob("*.safetensors")), tmp_path / "gone"):
        with pytest.raises(ValueError, match="k26 golden"):
            Golden.load(file)


def test_a_file_of_an_earlier_format_is_refused(
    golden_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Golden.load(golden_file)
    with monkeypatch.context() as patch:
        patch.setattr("k26_plugins.operate.golden.file.FORMAT", "k26-golden-2")
        golden.save(tmp_path / "earlier")
    with pytest.raises(ValueError, match=r"'k26-golden-2', expected .* Make one with `k26 golden`"):
        Golden.load(tmp_path / "earlier")


def test_the_published_model_needs_little_memory() -> None:
    """By hand, layer 0's three matrices take most: 396,361,728 weights in bfloat16 and in float32 are 2.4 GB."""
    carried = memory.Carried(tokens=8000, suspect_tokens=6000, longest=1000, patches=0)
    stages = memory.peak(K26Config(), carried, 64)
    weights = 396_361_728 * (2 + 4)
    # The state has hidden states, and of 61 layers 8 chosen experts and 4 near ones with their gaps; it is held twice.
    state = 7168 * (8000 * 6 + 6000 * 4) + 8000 * 61 * 12 * 6
    assert max(stages, key=stages.__getitem__) == "dense feed-forward"
    assert weights + 2 * state < stages["dense feed-forward"] < weights + 2 * state + 0.5e9
