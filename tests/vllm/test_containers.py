"""Tests that vLLM's own argument parser accepts the commands of containers/."""

from __future__ import annotations

import importlib

import pytest
from support.containers import ray_commands, served
from support.vllm_server import cli_args_module

COMMANDS = {
    **{f"machine {rank}": command for rank, command in enumerate(served("vllm"))},
    "ray": next(command for command in ray_commands() if command[0] == "vllm"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_is_vllms(name: str) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    program, verb, *flags = COMMANDS[name]
    assert (program, verb) == ("vllm", "serve")
    parser = importlib.import_module(cli_args_module()).make_arg_parser(FlexibleArgumentParser())
    arguments = parser.parse_args(flags)
    assert arguments.model_tag == "/model"
    assert (arguments.tensor_parallel_size, arguments.pipeline_parallel_size) == (8, 2)
    assert arguments.headless == (name == "machine 1")
