"""What vLLM's draft is given to read, out of a running server: `--worker-extension-cls support.vllm_hidden.Worker`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file
from support.server import Server


class Worker:
    """vLLM mixes it into its own. `self.model_runner` is the worker's."""

    model_runner: Any

    def k26_keep(self, file: str) -> None:
        """The next time that the draft is asked, writes what it is given."""
        drafter = self.model_runner.drafter
        propose = drafter.propose

        def keep(*args: Any, **asked: Any) -> Any:
            names = ("target_token_ids", "target_hidden_states")
            save_file({name: asked[name].clone().contiguous() for name in names}, file)
            drafter.propose = propose
            return propose(*args, **asked)

        drafter.propose = keep


def read_by_draft(server: Server, token_ids: list[int], file: Path) -> torch.Tensor:
    """`[T, layers · hidden_size]` of a prompt. The server has VLLM_SERVER_DEV_MODE=1."""
    asked = {"method": "k26_keep", "args": [str(file)]}
    httpx.post(f"{server.url}/collective_rpc", json=asked, timeout=60).raise_for_status()
    server.complete(token_ids, max_tokens=2)
    found = load_file(file)
    assert found["target_token_ids"].tolist() == token_ids
    return found["target_hidden_states"]
