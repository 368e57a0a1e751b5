"""Tests of prefill and decode in servers of their own: the decode server goes on from the KV cache that the prefill
server computed and sent by Mooncake."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import sglang_prefill
from support.agreement import assert_same_top
from support.entry_point import of_sglang
from support.server import Server, free_port
from support.sglang_server import EAGER, serve

pytestmark = pytest.mark.long
pytest.importorskip(
    "mooncake.engine",
    reason="needs mooncake-transfer-engine-non-cuda and libibverbs1, which the environment does not bring",
    exc_type=ImportError,
)
PROMPTS = [torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(6)]
Answer = tuple[int, list[dict[int, float]]]
"""The first token, and the likeliest tokens of the first two positions with their log-probabilities."""


def ask(server: Server, prompt: list[int], **fields: Any) -> Answer:
    sampling = {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True}
    asked = {"sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 5}
    answer = server.post("/generate", input_ids=prompt, **asked, **fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    top = [{token: logprob for logprob, token, *_ in entry} for entry in body["meta_info"]["output_top_logprobs"]]
    return body["output_ids"][0], top


def test_a_server_goes_on_from_the_kv_cache_of_another(tiny_folder: Path, tmp_path: Path) -> None:
    with serve(tiny_folder, tmp_path / "whole.log", **EAGER) as server:
        whole = [ask(server, prompt) for prompt in PROMPTS]
    port = free_port()
    # The overlap schedule is off, because with it SGLang notes by CUDA's events what it may send early.
    flags = ["--disaggregation-transfer-backend", "mooncake_tcp", "--disaggregation-bootstrap-port", str(port)]
    flags += ["--disable-overlap-schedule"]
    settings = {**EAGER, **of_sglang(sglang_prefill, tmp_path / "plugin")}
    mode = "--disaggregation-mode"
    with (
        serve(tiny_folder, tmp_path / "prefill.log", mode, "prefill", *flags, **settings) as prefill,
        serve(tiny_folder, tmp_path / "decode.log", mode, "decode", *flags, **settings) as decode,
        ThreadPoolExecutor(1) as pool,
    ):
        apart = []
        # Rooms are counted from 1, because SGLang takes room 0 for a request that has not come yet.
        for room, prompt in enumerate(PROMPTS, start=1):
            # The request goes to both servers, as a router would send it.
            place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
            computed = pool.submit(ask, prefill, prompt, **place)
            apart.append(ask(decode, prompt, **place))
            computed.result()
    assert_same_top([top[0] for _, top in apart], [top[0] for _, top in whole])
    same = [(one[1][1], other[1][1]) for one, other in zip(apart, whole, strict=True) if one[0] == other[0]]
    assert len(same) >= 4
    assert_same_top([one for one, _ in same], [other for _, other in same])
