"""Offers the core's tokenizer as vLLM's tokenizer mode `k26`, which `--tokenizer-mode auto` becomes for this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.tokenizers.hf import get_cached_tokenizer

from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer, tokenizer_folder


class K26Tokenizer:
    """The class of the tokenizer mode `k26`, of which vLLM calls only `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *args: Any,
        revision: str | None = None,
        download_dir: str | None = None,
        truncation_side: str = "left",
        **kwargs: Any,
    ) -> Any:
        """Load the tokenizer of a folder or of a name on the hub.

        No file of the checkpoint is executed, whatever `kwargs` allow.
        """
        folder = tokenizer_folder(path_or_repo_id, revision, download_dir)
        settings = {"name_or_path": str(path_or_repo_id), "truncation_side": truncation_side}
        # The tokenizer need not mark control tokens in messages: the renderer of this mode does.
        return get_cached_tokenizer(load_hf_tokenizer(folder, escape_messages=False, **settings))
