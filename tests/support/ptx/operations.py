"""Collects the instructions that the interpreter knows, by opcode with all modifiers; it refuses any other by name."""

from __future__ import annotations

from support.ptx import access, arithmetic, matrix, tensor

OPERATIONS = {**arithmetic.OPERATIONS, **access.OPERATIONS, **matrix.OPERATIONS, **tensor.OPERATIONS}
