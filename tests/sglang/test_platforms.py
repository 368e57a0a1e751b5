"""Tests of what SGLang would run on platforms other than this machine, with the plugin and without.

SGLang's own code settles the arguments while `override_platform` pretends the platform, once by itself and once with
the plugin's hook in front. Any difference beyond those that docs/platforms.md names is a fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.platforms import CPU, documented_table, table
from support.platforms import SGLANG_FLAGS as FLAGS
from support.platforms import SGLANG_PLATFORMS as PLATFORMS

from k26_plugins.sglang import compat

pytestmark = pytest.mark.skipif(
    find_spec("sglang.srt.arg_groups") is None, reason="this SGLang settles its arguments without a platform to pretend"
)

PARSERS = {"reasoning_parser": "kimi_k2", "tool_call_parser": "kimi_k2"}
"""The arguments that the plugin fills in on every platform if the command line leaves them out."""

Settled = dict[str, Any]


@pytest.fixture(scope="module")
def settle(tiny_folder: Path) -> Iterator[Callable[[str, str, bool], Settled | str]]:
    """Yield a function of the platform, the flags and whether the plugin's hook runs.

    The function returns every argument as SGLang settles it, or the text of SGLang's error if SGLang refuses.
    """
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.runtime_context import override_platform
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import common

    from k26_plugins.sglang.arguments import before_settling

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    names = [action.dest for action in parser._actions if action.dest != "help"]
    # Registration may have put the plugin's hook around `resolve_once`.
    resolve = getattr(ServerArgs.resolve_once, "__wrapped__", ServerArgs.resolve_once)

    def settled(platform: str, flags: str, plugin: bool) -> Settled | str:
        words = FLAGS[flags].replace("DIR", str(tiny_folder)).split()
        device = "cpu" if platform == CPU else "cuda"
        given = ["--model-path", str(tiny_folder), "--device", device, "--random-seed", "1", *words]
        arguments = ServerArgs.from_cli_args(parser.parse_args(given))
        with (
            override_platform(**PLATFORMS[platform]),
            mock.patch.object(compat, "on_gpu", return_value=platform != CPU),
        ):
            try:
                before_settling(resolve, arguments) if plugin else resolve(arguments)
            except (ValueError, AssertionError, ImportError) as error:
                return f"{type(error).__name__}: {error}"
            view = resolving_view(arguments)
            return {name: getattr(view, name) for name in names if hasattr(view, name)}

    with mock.patch.object(common, "get_device_memory_capacity", return_value=80 * 1024):
        yield settled


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("experts", ["auto", "engine", "triton"])
def test_sglang_settles_as_it_does_alone(
    settle: Callable[[str, str, bool], Settled | str], monkeypatch: pytest.MonkeyPatch, platform: str, experts: str
) -> None:
    """The plugin changes the parsers and, where the core's experts compute (in a hybrid run, or if K26_EXPERTS names
    them), the runner, and in a hybrid run on a GPU it turns off CUDA graphs for prefill; all else stays."""
    monkeypatch.setenv("K26_EXPERTS", experts)
    started = 0
    for flags in FLAGS:
        alone, ours = settle(platform, flags, False), settle(platform, flags, True)
        if isinstance(alone, str):
            assert ours == alone
            continue
        assert isinstance(ours, dict), (flags, ours)
        started += 1
        expected: dict[str, Any] = {} if flags == "parsers" else dict(PARSERS)
        hybrid = flags == "hybrid"
        # On a CPU SGLang asks no runner, so that the plugin chooses none.
        if platform != CPU and (hybrid or (experts == "triton" and not flags.startswith("runner"))):
            expected |= {"moe_runner_backend": "triton", "speculative_moe_runner_backend": "triton"}
            if alone["moe_runner_backend"] == "flashinfer_trtllm":
                # SGLang settles this argument along with that runner.
                expected["disable_shared_experts_fusion"] = False
        if hybrid and platform != CPU:
            expected["disable_prefill_cuda_graph"] = True
        assert {name: value for name, value in ours.items() if alone[name] != value} == expected, flags
    assert started >= len(FLAGS) // 2


def test_the_documented_table_is_what_sglang_settles(settle: Callable[[str, str, bool], Settled | str]) -> None:
    def cell(platform: str, flags: str) -> str:
        alone, ours = settle(platform, flags, False), settle(platform, flags, True)
        if isinstance(alone, str) or isinstance(ours, str):
            return "refused"
        found = [one["moe_runner_backend"] for one in (alone, ours)]
        return found[0] if found[0] == found[1] else f"{found[0]} → {found[1]}"

    assert documented_table("SGLang") == table(list(PLATFORMS), FLAGS, cell)
