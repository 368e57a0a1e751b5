"""SGLang's configuration class for this model, validated by the core when it is read from a checkpoint."""

from __future__ import annotations

import multiprocessing
from typing import Any

from k26_plugins.common.checkpoint import require_whole
from k26_plugins.common.serving import published_int4, write_vision
from k26_plugins.common.settings import check_settings
from k26_plugins.sglang import compat, logger


class KimiK25Config(compat.in_tree_config()):  # type: ignore[misc]
    """Keeps the in-tree class' name: transformers' registries compare names."""

    # Without it transformers' base class would write one, and the in-tree class' would not run.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As the in-tree class.

        Raises ConfigError, CheckpointError, or ValueError for a wrong setting, in the process that the user looks at.
        """
        found = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = published_int4(found, logger.warning)
        if config is None:
            return found
        write_vision(config, found.vision_config)
        found.vision_config.projector_ln_eps = config.vision.projector_ln_eps
        found.media_placeholder_token_id = config.media_placeholder_token_id
        if multiprocessing.parent_process() is None:
            require_whole(pretrained_model_name_or_path)
            check_settings()
        return found
