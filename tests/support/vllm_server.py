"""`vllm serve` for the tests."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from support.agreement import VOCABULARY
from support.server import Server, run_server

# vLLM's CPU backend wants to know which core is whose where two ranks share a NUMA node.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def serve(folder: Path, log: Path, *arguments: str, **environment: str) -> AbstractContextManager[Server]:
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--max-model-len", "4096"]
    command += ["--max-logprobs", str(VOCABULARY), *arguments]
    # 1 GB of KV cache.
    return run_server(command, folder, log, {"VLLM_CPU_KVCACHE_SPACE": "1", **environment})
