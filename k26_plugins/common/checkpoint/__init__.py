"""The checkpoint: its table of tensors, reading them, and checking a folder against the table."""

from k26_plugins.common.checkpoint.accounting import account
from k26_plugins.common.checkpoint.check import Report, check
from k26_plugins.common.checkpoint.classify import Classification, Layout, classify, classify_folder
from k26_plugins.common.checkpoint.fault import Fault, Problem, compare, folded
from k26_plugins.common.checkpoint.fingerprint import fingerprint
from k26_plugins.common.checkpoint.folder import local_folder, weights_folder
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
]
