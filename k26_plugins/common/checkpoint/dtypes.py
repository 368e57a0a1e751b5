"""The dtypes of a checkpoint's tensors as torch has them: apart from the table, which is read without torch."""

from __future__ import annotations

import torch

# By safetensors' names.
TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
