"""The core's tokenizer under vLLM's tokenizer interface: what `--tokenizer-mode auto` becomes for this model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file
from vllm.tokenizers.hf import get_cached_tokenizer

from k26_plugins.common.prompt.hf_tokenizer import load_hf_tokenizer
from k26_plugins.common.prompt.tokenizer import RANKS_FILE

FILES = (RANKS_FILE, "tokenizer_config.json", "chat_template.jinja")


class K26Tokenizer:
    """vLLM asks a tokenizer mode for a class with `from_pretrained`."""

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
        """The tokenizer of a folder or of a name on the hub. No file of it is executed, whatever `kwargs` allow."""
        folder = Path(path_or_repo_id)
        if not folder.is_dir():
            found = [
                cached_file(
                    str(path_or_repo_id),
                    name,
                    revision=revision,
                    cache_dir=download_dir,
                    _raise_exceptions_for_missing_entries=name == RANKS_FILE,
                )
                for name in FILES
            ]
            folder = Path(found[0]).parent
        return get_cached_tokenizer(
            load_hf_tokenizer(folder, name_or_path=str(path_or_repo_id), truncation_side=truncation_side)
        )
