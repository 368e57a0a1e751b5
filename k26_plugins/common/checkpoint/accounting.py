"""Check every tensor that an engine's loader delivers against the table, so that none is wrong, repeated or missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from k26_plugins.common.checkpoint.dtypes import TORCH_DTYPES
from k26_plugins.common.checkpoint.expert_names import expert_names
from k26_plugins.common.checkpoint.fault import compare
from k26_plugins.common.checkpoint.header import CheckpointError
from k26_plugins.common.checkpoint.table import TensorSpec, tensor_table
from k26_plugins.common.model.config import K26Config

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {torch.float16: "F16"}
NUM_NAMES_SHOWN = 8


def account(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: K26Config,
    is_expected: Callable[[TensorSpec], bool] = lambda spec: True,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights unchanged, and check each tensor against the table.

    weights: names and tensors as an engine's loader delivers them, on any device. Raises CheckpointError for a tensor
    that is extra, repeated, or of a wrong shape or dtype, and, after the last one, for tensors that are missing.
    is_expected: returns False for a tensor that the loader may leave out.
    """
    names = expert_names(config)
    seen: set[str] = set()
    for name, tensor in weights:
        spec = names.spec(name)
        # Nearly all of the 208,550 tensors are right; this test is faster than `compare`.
        if spec is None or tensor.shape != spec.shape or tensor.dtype != TORCH_DTYPES[spec.dtype]:
            problem = compare(name, tensor.shape, _NAMES.get(tensor.dtype, str(tensor.dtype)), spec)
            if problem:
                raise CheckpointError(f"{name} {problem.message}")
        if name in seen:
            raise CheckpointError(f"{name} is in the checkpoint twice: delete the file that is not of this model.")
        seen.add(name)
        yield name, tensor
    if len(seen) == names.num_tensors:
        return
    missing = [name for name, spec in tensor_table(config).items() if name not in seen and is_expected(spec)]
    if missing:
        shown = ", ".join(missing[:NUM_NAMES_SHOWN])
        more = f" and {len(missing) - NUM_NAMES_SHOWN} more" if len(missing) > NUM_NAMES_SHOWN else ""
        raise CheckpointError(f"missing from the checkpoint: {shown}{more}. Download it again.")
