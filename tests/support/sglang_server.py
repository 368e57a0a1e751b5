"""Starts SGLang's server for the tests, and reads its own API."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support import documented
from support.agreement import VOCABULARY
from support.images import image_part, png, random_image
from support.server import Server, run_server

# SGLang 0.5.10 and KTransformers' fork have no entry point for plugins, so their users set PYTHONPATH.
HAS_ENTRY_POINT = find_spec("sglang.srt.plugins") is not None
IS_FORK = any(distribution.name == "sglang-kt" for distribution in distributions())
runs_hybrid = pytest.mark.skipif(
    not (HAS_ENTRY_POINT or IS_FORK), reason="hybrid runs are checked on the newest SGLang and on KTransformers' fork"
)
needs_fork = pytest.mark.skipif(not IS_FORK, reason="`kt run` starts KTransformers' fork of SGLang, which is not here")

# If two ranks share a NUMA node, SGLang's CPU backend must be told which core belongs to which rank. SGLang uses NCCL
# for two ranks wherever it finds it, and the build from PyPI brings it, unlike a CPU build. SGLang also checks that all
# ranks find the same memory free, as ranks on GPUs do; on a CPU they read the machine's free memory one after the
# other, while other tests use some.
TWO_RANKS = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "SGLANG_NCCL_SO_PATH": "none",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
}
# Compiling the vision tower's interpolation takes half a minute at the first image; test_server.py still compiles it.
EAGER = {"TORCHDYNAMO_DISABLE": "1"}
# The size of chunked prefill in tokens, far below the prompts' lengths.
CHUNK = 64


def serve(
    folder: Path, log: Path, *arguments: str, command: Sequence[str] = (), ready: str = "fired up", **environment: str
) -> AbstractContextManager[Server]:
    """Start SGLang's server on the CPU, with the checkpoint in `folder`, as a context manager that yields it.

    arguments: further flags. command: the command that starts it, `python -m sglang.launch_server` by default. ready:
    the text in the log that says it is ready. environment: variables to add.
    """
    started = command or documented.as_run(documented.PLAIN_SGLANG, folder)
    # An idle scheduler would take a core from the tests.
    command = [*started, "--device", "cpu", "--max-total-tokens", "20000", "--mem-fraction-static", "0.2"]
    # For each request that may run, SGLang reserves an entry for every token of the context, which is 2 GB by default.
    command += ["--sleep-on-idle", "--max-running-requests", "64", *arguments]
    settings = {"SGLANG_USE_CPU_ENGINE": "1", **environment}
    if not HAS_ENTRY_POINT:
        settings["PYTHONPATH"] = boot_folder()
    return run_server(command, folder, log, settings, ready=ready)


def hybrid_flags(folder: Path, on_device: int) -> list[str]:
    """Return the flags of a hybrid run. on_device: how many experts of each layer the device gets."""
    return ["--kt-weight-path", str(folder), "--kt-method", "RAWINT4", "--kt-num-gpu-experts", str(on_device)]


@cache
def boot_folder() -> str:
    """Return the folder to put on PYTHONPATH for engines without an entry point, found as the README says."""
    command = [sys.executable, "-m", "k26_plugins.sglang.boot"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def generate(server: Server, input_ids: list[int], max_new_tokens: int, **sampling: Any) -> dict[str, Any]:
    """Return the answer of SGLang's own API: greedy, with the whole distribution at each position.

    sampling: further sampling parameters.
    """
    response = server.post(
        "/generate",
        input_ids=input_ids,
        sampling_params={"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True, **sampling},
        return_logprob=True,
        top_logprobs_num=VOCABULARY,
        logprob_start_len=0,
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def rows(entries: list[list[list[Any]]]) -> torch.Tensor:
    """Return the server's entries as log-probabilities `[positions, vocab]`.

    Each position has a list `[[logprob, token, …], …]`; a token that it does not name gets -inf.
    """
    out = torch.full((len(entries), VOCABULARY), -torch.inf)
    for position, entry in enumerate(entries):
        for logprob, token, *_ in entry:
            out[position, token] = logprob
    return out


def first_tokens(server: Server) -> list[dict[int, float]]:
    """Return, for six text prompts and one with an image, the likeliest next tokens and their log-probabilities.

    The image's entry is keyed by rank, since the chat API names no token ids.
    """
    found = []
    for index in range(6):
        prompt = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(index)).tolist()
        answer = server.post(
            "/generate",
            input_ids=prompt,
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            top_logprobs_num=5,
        ).json()
        found.append({token: logprob for logprob, token, *_ in answer["meta_info"]["output_top_logprobs"][0]})
    content = [image_part(png(random_image(100, 80))), {"type": "text", "text": "What?"}]
    entry = server.chat(content, max_tokens=1, temperature=0, logprobs=True, top_logprobs=5)
    top_tokens = entry["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found.append({index: item["logprob"] for index, item in enumerate(top_tokens)})
    return found
