"""Tests of the vision encoder in a server of its own.

Another server, which lacks the encoder's weights, answers about images with the embeddings that the encoder's server
computed. The answers are compared with those of a server that has both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support import sglang_foreign_kernels
from support.agreement import assert_same_top
from support.entry_point import of_sglang
from support.images import image_part, png, random_image
from support.server import Server, free_port
from support.sglang_server import EAGER, HAS_ENTRY_POINT, serve
from support.videos import make_video, video_part

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not HAS_ENTRY_POINT, reason="what stands in for another model's kernels is a plugin's work"),
]
TRANSFERS = {
    "zmq_to_scheduler": "no server of the encoder has encoded the request's images",
    "zmq_to_tokenizer": "The encoder did not return multimodal embeddings",
}
"""The error if there are no embeddings, for each transfer backend; the second error is SGLang's own."""
# The last image has 16 bits per pixel, which SGLang's own reading would turn into a white image.
IMAGES = [
    *(png(random_image(120, 80, seed)) for seed in range(5)),
    png(Image.fromarray(np.random.default_rng(5).integers(0, 2**16, (80, 120), dtype=np.uint16))),
]


@dataclass
class Apart:
    """A server that answers without an encoder, the address at which encoders' servers report to it, and the flags of
    their transfer backend."""

    server: Server
    reports: str
    transfer: list[str]


@pytest.fixture(scope="module", params=TRANSFERS)
def answering(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Apart]:
    port, transfer = free_port(), ["--encoder-transfer-backend", request.param]
    arguments = ["--language-only", "--encoder-bootstrap-port", str(port), *transfer]
    log = tmp_path_factory.mktemp("answering") / "server.log"
    with serve(tiny_folder, log, *arguments, **EAGER) as server:
        yield Apart(server, f"http://127.0.0.1:{port}", transfer)


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, answering: Apart) -> Iterator[Server]:
    work = tmp_path_factory.mktemp("encoder")
    arguments = ["--encoder-only", *answering.transfer, "--encoder-register-urls", answering.reports]
    settings = {**EAGER, **of_sglang(sglang_foreign_kernels, work / "plugin")}
    with serve(tiny_folder, work / "server.log", *arguments, ready="init finish", **settings) as server:
        end = time.monotonic() + 60
        while server.url not in httpx.get(f"{answering.reports}/list_encoder_urls").json()["encoder_urls"]:
            assert time.monotonic() < end, "the server of the encoder has not reported"
            time.sleep(0.5)
        yield server


def ask(server: Server, *media: dict[str, Any]) -> httpx.Response:
    content = [*media, {"type": "text", "text": "What?"}]
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 5}
    return server.post("/v1/chat/completions", messages=[{"role": "user", "content": content}], **asked)


def to_images(server: Server) -> list[dict[int, float]]:
    """Return the log-probabilities of an answer's likeliest first tokens, in their order, for a question about each
    image and for one about two images."""
    found = []
    for images in [*([image] for image in IMAGES), IMAGES[:2]]:
        answer = ask(server, *map(image_part, images))
        assert answer.status_code == 200, answer.text
        (entry,) = answer.json()["choices"][0]["logprobs"]["content"]
        found.append({index: item["logprob"] for index, item in enumerate(entry["top_logprobs"])})
    return found


def test_without_an_encoder_images_are_refused(answering: Apart) -> None:
    """With zmq_to_scheduler, SGLang without the plugin would answer about images with a vision tower that has no
    weights."""
    answer = ask(answering.server, image_part(IMAGES[0]))
    assert answer.status_code == 503
    assert TRANSFERS[answering.transfer[1]] in answer.text
    assert ask(answering.server).status_code == 200


def test_a_server_answers_with_the_embeddings_of_an_encoder(answering: Apart, encoder: Server, server: Server) -> None:
    assert_same_top(to_images(answering.server), to_images(server))
    assert encoder.log.read_text().count("/encode completed") >= len(IMAGES)


def test_what_the_encoder_cannot_take_is_refused(answering: Apart, encoder: Server) -> None:
    refused = {
        "the data is no image in a format that is known": image_part(b"no image"),
        "a server of the encoder alone takes images, and this is video": video_part(make_video(4)),
    }
    for words, medium in refused.items():
        answer = ask(answering.server, medium)
        if answering.transfer[1] == "zmq_to_scheduler":
            assert answer.status_code == 400
            assert words in answer.text
        else:
            # With zmq_to_tokenizer SGLang's answer says no more than that there are no embeddings.
            assert answer.status_code == 503
        assert words in encoder.log.read_text()
    assert ask(answering.server, image_part(IMAGES[0])).status_code == 200
    assert encoder.alive()
