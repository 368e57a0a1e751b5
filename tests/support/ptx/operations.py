"""Every instruction that is known, by its opcode with all modifiers: any other is refused by name."""

from __future__ import annotations

from support.ptx import access, arithmetic, matrix, tensor

OPERATIONS = {**arithmetic.OPERATIONS, **access.OPERATIONS, **matrix.OPERATIONS, **tensor.OPERATIONS}
