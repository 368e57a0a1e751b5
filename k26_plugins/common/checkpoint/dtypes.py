"""Map safetensors' names of the dtypes in a checkpoint to torch's dtypes.

The module is separate from the table, which must not import torch.
"""

from __future__ import annotations

import torch

TORCH_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
