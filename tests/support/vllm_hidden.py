"""Gets from a running vLLM the hidden states that its draft model is given.

The server takes `--worker-extension-cls support.vllm_hidden.Worker`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file
from support.server import Server


class Worker:
    """A method that vLLM mixes into its worker class. `self.model_runner` is the worker's."""

    model_runner: Any

    def k26_keep(self, file: str) -> None:
        """Write what the draft model is given, the next time that it is asked, to a safetensors file."""
        drafter = self.model_runner.drafter
        propose = drafter.propose

        def keep(*args: Any, **asked: Any) -> Any:
            names = ("target_token_ids", "target_hidden_states")
            save_file({name: asked[name].clone().contiguous() for name in names}, file)
            drafter.propose = propose
            return propose(*args, **asked)

        drafter.propose = keep


def read_by_draft(server: Server, token_ids: list[int], file: Path) -> torch.Tensor:
    """Return the hidden states that the draft model is given for a prompt, `[T, layers · hidden_size]`.

    The server must run with VLLM_SERVER_DEV_MODE=1. file: where its worker writes them.
    """
    asked = {"method": "k26_keep", "args": [str(file)]}
    httpx.post(f"{server.url}/collective_rpc", json=asked, timeout=60).raise_for_status()
    server.complete(token_ids, max_tokens=2)
    found = load_file(file)
    assert found["target_token_ids"].tolist() == token_ids
    return found["target_hidden_states"]
