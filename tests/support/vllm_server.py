"""Starts `vllm serve` for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

from support import documented
from support.agreement import VOCABULARY
from support.server import Server, run_server

# If two ranks share a NUMA node, vLLM's CPU backend must be told which core belongs to which rank.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def serve(
    folder: Path, log: Path, *arguments: str, command: Sequence[str] = (), **environment: str
) -> AbstractContextManager[Server]:
    """Start vLLM's server with the checkpoint in `folder`, as a context manager that yields it.

    arguments: further flags. command: the command that starts it, `vllm serve` by default. environment: variables to
    add.
    """
    started = command or documented.as_run(documented.PLAIN_VLLM, folder)
    command = [*started, "--max-model-len", "4096", "--max-logprobs", str(VOCABULARY), *arguments]
    # 1 GB of KV cache, and a thread that may move between cores: a pinned thread would wait for a core on which another
    # server's thread works.
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return run_server(command, folder, log, {**settings, **environment})


def cli_args_module() -> str:
    """Return the name of vLLM's module with a server's flags, which differs between releases."""
    places = (f"vllm.entrypoints.{place}" for place in ("common", "launchers", "openai"))
    place = next(one for one in places if find_spec(one) is not None and find_spec(f"{one}.cli_args") is not None)
    return f"{place}.cli_args"
