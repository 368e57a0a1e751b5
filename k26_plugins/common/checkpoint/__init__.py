"""The checkpoint: the table of its tensors, reading them, and checking a folder against the table.

The modules that read tensors need torch, whose import takes seconds; each of them is imported when a name of it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from k26_plugins.common.checkpoint.check import Report, check
from k26_plugins.common.checkpoint.classify import Classification, Layout, classify, classify_folder
from k26_plugins.common.checkpoint.fault import Fault, Problem, compare, folded
from k26_plugins.common.checkpoint.folder import local_folder, weights_folder, whole_folder
from k26_plugins.common.checkpoint.header import CheckpointError
from k26_plugins.common.checkpoint.table import (
    ShardError,
    TensorSpec,
    expert_bytes,
    expert_name,
    shard,
    tensor_table,
)

if TYPE_CHECKING:
    from k26_plugins.common.checkpoint.accounting import account
    from k26_plugins.common.checkpoint.fingerprint import fingerprint
    from k26_plugins.common.checkpoint.reader import Checkpoint
    from k26_plugins.common.checkpoint.stream import StreamedCheckpoint

_READING = {
    "account": "accounting",
    "fingerprint": "fingerprint",
    "Checkpoint": "reader",
    "StreamedCheckpoint": "stream",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Classification",
    "Fault",
    "Layout",
    "Problem",
    "Report",
    "ShardError",
    "StreamedCheckpoint",
    "TensorSpec",
    "account",
    "check",
    "classify",
    "classify_folder",
    "compare",
    "expert_bytes",
    "expert_name",
    "fingerprint",
    "folded",
    "local_folder",
    "shard",
    "tensor_table",
    "weights_folder",
    "whole_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _READING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_READING[name]}"), name)
    return value
