"""Extends SGLang's configuration class for this model, so that the core validates a configuration when it is read."""

from __future__ import annotations

import multiprocessing
from typing import Any

from k26_plugins.common.adapters.serving import core_answer, write_vision
from k26_plugins.common.checkpoint import Layout, weights_folder
from k26_plugins.common.settings import check_settings
from k26_plugins.sglang import compat, logger


class KimiK25Config(compat.in_tree_config()):  # type: ignore[misc]
    """The in-tree configuration class with the core's check.

    It keeps the in-tree class's name, because transformers' registries compare names.
    """

    # Without this constructor transformers' base class would generate one, and the in-tree class's would not run.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read a configuration by the in-tree class, and write the core's values into it if the core serves the
        checkpoint.

        Raises ConfigError, CheckpointError, or ValueError for a wrong setting, in the process whose output the user
        sees.
        """
        found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        is_parent = multiprocessing.parent_process() is None
        if is_parent:
            check_settings()
        warn = logger.warning if is_parent else logger.debug
        folder = weights_folder(pretrained_model_name_or_path, kwargs.get("revision"))
        answer = core_answer(found, folder, warn)
        # The model's constructor reads these two attributes, in the same process.
        found.k26_published_layout = answer is not None
        found.k26_saved_experts = answer is not None and answer.layout is Layout.SAVED
        if answer is None:
            return found
        config = answer.config
        write_vision(config, found.vision_config)
        found.vision_config.projector_ln_eps = config.vision.projector_ln_eps
        found.media_placeholder_token_id = config.media_placeholder_token_id
        return found
