"""The checkpoint: its table of tensors, reading them, and checking a folder against the table."""

from k26_plugins.common.checkpoint.accounting import account
from k26_plugins.common.checkpoint.check import Fault, Problem, Report, check, compare, require_whole
from k26_plugins.common.checkpoint.fingerprint import fingerprint
from k26_plugins.common.checkpoint.header import CheckpointError
from k26_plugins.common.checkpoint.reader import Checkpoint
from k26_plugins.common.checkpoint.stream import StreamedCheckpoint
from k26_plugins.common.checkpoint.table import (
    ShardError,
    TensorSpec,
    expert_bytes,
    expert_name,
    shard,
    tensor_table,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Fault",
    "Problem",
    "Report",
    "ShardError",
    "StreamedCheckpoint",
    "TensorSpec",
    "account",
    "check",
    "compare",
    "expert_bytes",
    "expert_name",
    "fingerprint",
    "require_whole",
    "shard",
    "tensor_table",
]
