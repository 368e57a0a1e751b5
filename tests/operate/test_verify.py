"""Tests that `k26 verify` finds and locates each seeded fault, and that a right server passes. The served model is the
reference in bfloat16."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.endpoint import Fault, serve_reference, yarn_factor
from support.faults import FAULTY_EXPERT, FAULTY_LAYER, LOCATED, causes, shift_by_three

from k26_plugins.cli import app
from k26_plugins.common.checkpoint.table import expert_name
from k26_plugins.common.model.config import K26Config
from k26_plugins.operate.verify.distance import kl_of_reported
from k26_plugins.operate.verify.needle import find_needles
from k26_plugins.operate.verify.tools import BOOK, WEATHER, faults_of

FAULTY = expert_name(FAULTY_LAYER, FAULTY_EXPERT, "down", "scale")


def swap_gate_and_up(name: str) -> str:
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    owner, projection, part = name.rsplit(".", 2) if ".experts." in name else (name, "", "")
    return f"{owner}.{swap[projection]}.{part}" if projection in swap else name


def swap_shards(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Put two ranks' columns of every down projection in each other's place."""
    if ".experts." in name and "down_proj" in name and not name.endswith("shape"):
        return torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
    return tensor


def double_one_scale(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2 if name == FAULTY else tensor


def drop_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if "e_score_correction_bias" in name else tensor


FAULTS = {
    "one expert's scale doubled": Fault(tensor=double_one_scale),
    "gate and up swapped": Fault(read_as=swap_gate_and_up),
    "router bias dropped": Fault(tensor=drop_bias),
    "YaRN's factor halved": Fault(config=yarn_factor(32.0)),
    "YaRN off": Fault(config=yarn_factor(1.0)),
    "YaRN's factor 8": Fault(config=yarn_factor(8.0)),
    "padding after normalizing": Fault(padding=0.0),
    "tensor-parallel shards swapped": Fault(tensor=swap_shards),
    "token ids shifted by 3": Fault(token_ids=shift_by_three),
    "think block missing": Fault(text=lambda text: text.removesuffix("<think>")),
}
ALSO_LOCATED = {"YaRN off": "not stretched by YaRN", "YaRN's factor 8": "positions or attention"}


def verify(url: str, golden_file: Path, *options: object) -> tuple[int, str]:
    command = ["verify", "--url", url, "--golden", str(golden_file), *map(str, options)]
    result = CliRunner().invoke(app, command)
    return result.exit_code, result.output


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found_and_located(tiny_folder: Path, golden_file: Path, name: str) -> None:
    with serve_reference(tiny_folder, FAULTS[name]) as url:
        code, output = verify(url, golden_file)
    assert code == 1, output
    assert {**LOCATED, **ALSO_LOCATED}[name] in causes(output), output


@pytest.mark.parametrize("vendor", [False, True], ids=["vllm-like", "vendor-like"])
def test_what_is_right_passes(tiny_folder: Path, golden_file: Path, vendor: bool) -> None:
    with serve_reference(tiny_folder, vendor=vendor) as url:
        code, output = verify(url, golden_file)
    assert code == 0, output
    assert ("not shown: distributions of the prompts' own tokens" in output) == vendor


@pytest.mark.parametrize("name", ["gate and up swapped", "think block missing"])
def test_a_vendor_that_reports_answers_only(tiny_folder: Path, golden_file: Path, name: str) -> None:
    with serve_reference(tiny_folder, FAULTS[name], vendor=True) as url:
        code, output = verify(url, golden_file)
    assert code == 1, output


def test_the_report_is_written(tiny_folder: Path, golden_file: Path, tmp_path: Path) -> None:
    with serve_reference(tiny_folder, FAULTS["one expert's scale doubled"]) as url:
        verify(url, golden_file, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html")
    report = json.loads((tmp_path / "a.json").read_text())
    assert not report["passed"]
    assert {position["kind"] for position in report["positions"]} == {"text", "image", "answer"}
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 3
    assert "routed expert 5 of layer 2" in page
    assert "http" not in page.replace("http://127.0.0.1", "").replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_a_server_that_is_not_there(golden_file: Path) -> None:
    code, output = verify("http://127.0.0.1:9", golden_file)
    assert code == 2
    assert "does not answer as an OpenAI-compatible server" in output


def test_the_distance_by_hand() -> None:
    """Two tokens have 1/2 and 1/4 against 1/4 and 1/2, and the rest is one cell of 1/4 on each side, so KL = (1/2 −
    1/4) · ln 2."""
    half, quarter = -0.6931471805599453, -1.3862943611198906
    assert kl_of_reported({1: half, 2: quarter, 9: -5.0}, {1: quarter, 2: half}) == pytest.approx(0.25 * -half)
    assert kl_of_reported({1: half}, {1: half}) == 0.0
    assert str(kl_of_reported({1: half}, {2: half})) == "nan"


def call(name: str, arguments: str, call_id: str = "functions.get_weather:0") -> dict[str, Any]:
    return {"id": call_id, "function": {"name": name, "arguments": arguments}}


GOOD = call("get_weather", '{"city": "Paris"}')
TOOL_ANSWERS = {
    "good": ({"tool_calls": [GOOD]}, "tool_calls", ""),
    "no call": ({"content": "4"}, "stop", ""),
    "a hyphen in the name": (
        {"tool_calls": [call("book-table", '{"restaurant": "A", "guests": 2}', "functions.book-table:12")]},
        "tool_calls",
        "",
    ),
    "another id": (
        {"tool_calls": [call("get_weather", '{"city": "Paris"}', "call_abc123")]},
        "tool_calls",
        "call_abc123",
    ),
    "no JSON": ({"tool_calls": [call("get_weather", '{"city": ')]}, "tool_calls", "no JSON"),
    "wrong type": ({"tool_calls": [call("get_weather", '{"city": 3}')]}, "tool_calls", "3 is not of type 'string'"),
    "unknown tool": ({"tool_calls": [call("fly", "{}")]}, "tool_calls", "not offered"),
    "wrong stop": ({"tool_calls": [GOOD]}, "stop", "expected 'tool_calls'"),
    "nothing called": ({"content": ""}, "tool_calls", "holds no call"),
    "leak": ({"content": "<|tool_calls_section_begin|>"}, "stop", "control token <|tool_calls_section_begin|>"),
    "cut": ({"tool_calls": [call("get_weather", '{"ci')]}, "length", ""),
}


@pytest.mark.parametrize("name", TOOL_ANSWERS)
def test_tool_calls(name: str) -> None:
    message, reason, fault = TOOL_ANSWERS[name]
    faults = faults_of({"message": message, "finish_reason": reason}, [WEATHER, BOOK])
    assert (fault in " ".join(faults)) if fault else not faults


def test_tool_calls_of_a_server(tiny_folder: Path, golden_file: Path) -> None:
    for reason, code in (("tool_calls", 0), ("stop", 1)):
        answer = {"message": {"tool_calls": [GOOD]}, "finish_reason": reason}
        with serve_reference(tiny_folder, message=answer) as url:
            found, output = verify(url, golden_file, "--tools")
        assert found == code, output
        assert "8 calls in 8 answers" in output


def reads_the_boxes(messages: list[dict[str, Any]]) -> str:
    text = messages[0]["content"]
    asked = re.search(r"What number does box (\d+) hold", text)
    assert asked
    return re.findall(rf"^Box {asked[1]} is \w+ and holds (\d+)\.$", text, re.MULTILINE)[0]


class Talker:
    """An endpoint that answers chats only, with a context of `limit` tokens."""

    def __init__(self, speak: Callable[[list[dict[str, Any]]], str], limit: int | None) -> None:
        self.speak, self.limit = speak, limit

    def context_length(self) -> int | None:
        return self.limit

    def chat(self, messages: list[dict[str, Any]], **body: Any) -> dict[str, Any]:
        return {"choices": [{"message": {"content": self.speak(messages)}}]}


@pytest.mark.parametrize(("limit", "asked"), [(None, 9), (262_144, 9), (131_072, 6), (8192, 0)])
def test_needles_where_the_context_allows(limit: int | None, asked: int) -> None:
    found = find_needles(Talker(reads_the_boxes, limit))  # type: ignore[arg-type]
    assert [needle.right for needle in found] == [True] * asked + [False] * (9 - asked)
    assert all(str(limit)[:1] in needle.note for needle in found[asked:])
    # The number in the first line of the boxes is no answer.
    wrong = find_needles(Talker(lambda messages: messages[0]["content"].split("holds ")[1][:6], limit))  # type: ignore[arg-type]
    assert not any(needle.right for needle in wrong)


def test_needles_of_a_server(tiny_folder: Path, golden_file: Path) -> None:
    """The reference's weights are random, so a function answers for it. The texts are short, because the tiny
    vocabulary counts bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k26_plugins.operate.verify.needle.LENGTHS", (20,))
        with serve_reference(tiny_folder, speak=reads_the_boxes) as url:
            output = verify(url, golden_file, "--needle")[1]
        assert "pass  needles: 3 of 3 found" in output
        with serve_reference(tiny_folder, speak=lambda messages: "42") as url:
            assert "FAIL  needles: 0 of 3 found; lost in" in verify(url, golden_file, "--needle")[1]


def test_the_seeded_config_is_another(tiny_folder: Path) -> None:
    """A seeded fault changes the configuration as it says, because a fault that changed nothing could not be found."""
    config = K26Config.from_path(tiny_folder)
    assert yarn_factor(32.0)(config).text.rope_scaling.factor == config.text.rope_scaling.factor / 2


@pytest.mark.parametrize("name", ["none", "gate and up swapped", "token ids shifted by 3", "padding after normalizing"])
def test_endpoints_against_each_other(tiny_folder: Path, prompts_file: Path, tmp_path: Path, name: str) -> None:
    files = [tmp_path / "a.json", tmp_path / "a.html"]
    with serve_reference(tiny_folder) as first, serve_reference(tiny_folder, FAULTS.get(name, Fault())) as second:
        command = ["compare", first, second, "--prompts", str(prompts_file), "--answer-tokens", "3"]
        result = CliRunner().invoke(app, [*command, "--json", str(files[0]), "--html", str(files[1])])
    assert result.exit_code == (0 if name == "none" else 1), result.output
    (pair,) = json.loads(files[0].read_text())
    assert pair["agree"] == (name == "none")
    # All four prompts are compared, the one of raw text among them.
    expected = 1 if name == "token ids shifted by 3" else 4
    assert f"{expected} of 4 prompts become the same tokens" in result.output
    assert pair["not_shown"] == []
    page = files[1].read_text()
    assert ("The endpoints agree" in page) == (name == "none")
    assert page.count("<svg") == 1


def test_raw_text_is_not_shown_of_a_vendor(tiny_folder: Path, prompts_file: Path) -> None:
    with serve_reference(tiny_folder) as first, serve_reference(tiny_folder, vendor=True) as second:
        result = CliRunner().invoke(app, ["compare", first, second, "--prompts", str(prompts_file)])
    assert result.exit_code == 0, result.output
    assert "not shown: raw: a prompt of raw text" in result.output
