"""Tests of other ways to run the server: two ranks, compiled, the prefix cache, another model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support import documented, vllm_updates
from support.absent import plugin_that_rank_1_lacks
from support.agreement import BYTES, assert_same_top
from support.checkpoints import LLAMA_PROMPT, make_llama
from support.images import image_part, png, random_image
from support.local_http import QuietHandler, serving
from support.ray_cluster import ray_cluster
from support.server import Server, python_path, start_fails
from support.swarm import assert_a_killed_worker_is_said, metric, run_swarm
from support.videos import make_video
from support.vllm_server import TWO_RANKS, serve

from k26_plugins.cli import app


@pytest.fixture(scope="module")
def one_rank(server: Server) -> Server:
    return server


def first_tokens(server: Server) -> list[dict[int, float]]:
    """Return the likeliest next tokens of several prompts, of text and with an image, and their log-probabilities.

    The keys are token ids; for the prompt with an image they are the tokens' ranks.
    """
    found = []
    for index in range(6):
        prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(index)).tolist()
        answer = server.complete(
            prompt, max_tokens=1, temperature=0, logprobs=5, return_tokens_as_token_ids=True, allowed_token_ids=BYTES
        )
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        found.append({int(key.removeprefix("token_id:")): value for key, value in top.items()})
    content = [image_part(png(random_image(100, 80))), {"type": "text", "text": "What?"}]
    entry = server.chat(content, max_tokens=1, temperature=0, logprobs=True, top_logprobs=5)
    top_tokens = entry["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found.append({index: item["logprob"] for index, item in enumerate(top_tokens)})
    return found


def assert_two_ranks_answer_as_one(
    one_rank: Server,
    *arguments: str,
    command: Sequence[str] = (),
    then: Callable[[Server], None] = lambda server: None,
) -> None:
    folder, log = Path(one_rank.model), one_rank.log.with_name("two-ranks.log")
    with serve(folder, log, "--enforce-eager", *arguments, command=command, **TWO_RANKS) as server:
        assert_same_top(first_tokens(server), first_tokens(one_rank))
        then(server)


def test_the_documented_command_on_two_ranks_answers_as_one(one_rank: Server, tiny_folder: Path) -> None:
    def both_report_and_neither_goes_on_alone(server: Server) -> None:
        assert len(metric(server, "k26_experts_layers")) == 2
        assert_a_killed_worker_is_said(server, "Worker_TP1")

    command = documented.as_run(documented.VLLM, tiny_folder)
    assert_two_ranks_answer_as_one(one_rank, command=command, then=both_report_and_neither_goes_on_alone)


def test_expert_parallel_ranks_answer_as_one(one_rank: Server) -> None:
    assert_two_ranks_answer_as_one(one_rank, "--tensor-parallel-size", "2", "--enable-expert-parallel")


@pytest.mark.long
@pytest.mark.parametrize(
    # Without --api-server-count vLLM starts as many API servers as ranks.
    "more",
    [(), ("--enable-expert-parallel", "--api-server-count", "1")],
    ids=["tensor", "expert"],
)
def test_data_parallel_ranks_answer_as_one(
    one_rank: Server, golden_file: Path, tmp_path: Path, more: Sequence[str]
) -> None:
    """Each rank has requests of its own and a part of every layer's experts, so that the ranks exchange tokens at every
    step."""
    arguments = ["--data-parallel-size", "2", "--worker-extension-cls", "support.vllm_gathers.Worker", *more]
    settings = {"PYTHONPATH": python_path(), **TWO_RANKS}
    expected = first_tokens(one_rank)
    with serve(Path(one_rank.model), tmp_path / "log", "--enforce-eager", *arguments, **settings) as server:
        # A single request leaves the other rank without one. Of many requests at once both ranks have some, of
        # different lengths.
        assert_same_top(first_tokens(server), expected)
        with ThreadPoolExecutor(6) as pool:
            verified = pool.submit(
                CliRunner().invoke, app, ["verify", "--url", server.url, "--golden", str(golden_file)]
            )
            for found in pool.map(lambda _: first_tokens(server), range(5)):
                assert_same_top(found, expected)
        assert verified.result().exit_code == 0, verified.result().output
        assert len(metric(server, "k26_experts_layers")) == 2
        answered = dict.fromkeys(("0", "1"), 0.0)
        for labels, count in metric(server, "vllm:request_success_total").items():
            answered[re.findall(r'engine="(\d+)"', labels)[0]] += count
        print(f"requests answered by rank: {answered}")
        assert min(answered.values()) >= 10


RAY = ["--distributed-executor-backend", "ray", "--tensor-parallel-size", "2"]


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@needs_ray
def test_two_of_rays_workers_answer_as_one(one_rank: Server, tmp_path: Path) -> None:
    with (
        ray_cluster(tmp_path) as settings,
        serve(Path(one_rank.model), tmp_path / "log", "--enforce-eager", *RAY, **settings, **TWO_RANKS) as server,
    ):
        assert "RayWorkerProc" in server.log.read_text()
        assert_same_top(first_tokens(server), first_tokens(one_rank))
        assert len(metric(server, "k26_experts_layers")) == 2


@pytest.mark.long
@needs_ray
def test_a_ray_worker_without_the_plugin_stops_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    lacking = plugin_that_rank_1_lacks(tmp_path / "plugin", "vllm", "vllm.general_plugins")
    with (
        ray_cluster(tmp_path, tmp_path / "plugin") as settings,
        start_fails("k26-plugins is not active on rank 1 of 2"),
        serve(tiny_folder, tmp_path / "log", "--enforce-eager", *RAY, **{**lacking, **settings}, **TWO_RANKS),
    ):
        pass


def test_a_rank_without_the_plugin_stops_the_start(tiny_folder: Path, tmp_path: Path) -> None:
    settings = plugin_that_rank_1_lacks(tmp_path / "plugin", "vllm", "vllm.general_plugins")
    with (
        start_fails("k26-plugins is not active on rank 1 of 2"),
        serve(tiny_folder, tmp_path / "log", "--enforce-eager", "--tensor-parallel-size", "2", **settings, **TWO_RANKS),
    ):
        pass


def test_compiled_answers_as_eager(tiny_folder: Path, tmp_path: Path, one_rank: Server) -> None:
    """torch.compile compiles the model around the experts' operator, which must not break the graph."""
    with serve(tiny_folder, tmp_path / "log") as server:
        assert_same_top(first_tokens(server), first_tokens(one_rank))


@pytest.mark.long
def test_weights_that_a_trainer_sends_later(
    tiny_folder: Path, golden_file: Path, updated: tuple[Path, Path], tmp_path: Path
) -> None:
    """A server that starts with dummy weights answers, and after each update of its weights it answers as a server that
    was started with the new ones. Such a vLLM cannot load weights from the disk, so that they come in buckets."""
    shutil.copytree(tiny_folder, tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    arguments = ["--enforce-eager", "--load-format", "dummy", *vllm_updates.ARGUMENTS]
    settings = {"PYTHONPATH": python_path(), "VLLM_SERVER_DEV_MODE": "1"}
    with serve(tmp_path / "small", tmp_path / "log", *arguments, **settings) as server:
        assert server.complete("Hello", max_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4
        for folder, golden in (updated, (tiny_folder, golden_file)):
            vllm_updates.in_buckets(server, folder)
            result = CliRunner().invoke(app, ["verify", "--url", server.url, "--golden", str(golden)])
            assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def prefix_caching(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Yield a server with a prefix cache. MLA is off, because vLLM's MLA for CPUs has no prefix cache."""
    arguments = ["--enforce-eager", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
    with serve(tiny_folder, tmp_path_factory.mktemp("prefix") / "log", *arguments, VLLM_MLA_DISABLE="1") as running:
        yield running


def test_a_second_request_hits_the_prefix_cache(prefix_caching: Server) -> None:
    """A second request finds the first one's prompt in the prefix cache, and has the same answer."""
    prompt = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = (prefix_caching.complete(prompt, max_tokens=4, temperature=0, ignore_eos=True) for _ in range(2))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    result = run_swarm(prefix_caching.url, 12, 40, "--images", "0")
    assert result.exit_code == 0, result.output
    rate = re.search(r"prefix cache: ([\d.]+)% of the prompt tokens found", result.output)
    assert rate is not None, result.output
    assert float(rate[1]) > 50


def test_media_by_url_are_known_by_their_content(prefix_caching: Server) -> None:
    """A second request with the same URLs finds the media in the prefix cache; another video under the same URL is not
    taken for the first."""
    files = {"/image": png(random_image(300, 200)), "/video": make_video(12, size=(320, 240))}

    class Files(QuietHandler):
        def do_GET(self) -> None:  # noqa: N802 - the name that http.server looks for
            self.send(200, files[self.path])

    def ask(url: str) -> tuple[int, int, list[int]]:
        """Return the prompt's number of tokens, how many of them were found in the cache, and the answer's token
        ids."""
        content = [
            {"type": "video_url", "video_url": {"url": f"{url}/video"}},
            {"type": "image_url", "image_url": {"url": f"{url}/image"}},
            {"type": "text", "text": "What do you see?"},
        ]
        answer = prefix_caching.chat(content, max_tokens=4, temperature=0, return_token_ids=True)
        usage = answer["usage"]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        return usage["prompt_tokens"], cached, answer["choices"][0]["token_ids"]

    with serving(Files) as url:
        length, cached, first = ask(url)
        assert cached == 0
        _, cached, second = ask(url)
        assert cached > length - 128
        assert second == first
        files["/video"] = make_video(12, size=(320, 240), turned=180)
        changed_length, cached, _ = ask(url)
        assert changed_length == length
        assert cached < 64


def test_another_architecture_is_left_to_vllm(tmp_path: Path) -> None:
    """A small Llama is answered with transformers' tokens, and the plugin writes nothing to the log."""
    expected = make_llama(tmp_path / "llama")
    arguments = ["--enforce-eager", "--skip-tokenizer-init", "--dtype", "float32"]
    with serve(tmp_path / "llama", tmp_path / "log", *arguments) as server:
        answer = server.complete(
            LLAMA_PROMPT, max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True, detokenize=False
        )
        assert answer["choices"][0]["token_ids"] == expected
        assert "k26-plugins" not in server.log.read_text()
