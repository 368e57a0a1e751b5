"""Tests that SGLang's own argument parser accepts the commands of containers/."""

from __future__ import annotations

import argparse

import pytest
from support.containers import served


@pytest.mark.parametrize("rank", [0, 1])
def test_the_command_is_sglangs(rank: int) -> None:
    from sglang.srt.server_args import ServerArgs

    program, option, module, *flags = served("sglang")[rank]
    assert (program, option, module) == ("python3", "-m", "sglang.launch_server")
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = parser.parse_args(flags)
    assert (arguments.tp_size, arguments.pp_size, arguments.nnodes, arguments.node_rank) == (8, 2, 2, rank)
