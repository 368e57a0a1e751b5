"""Parses PTX text into instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Address:
    """A memory operand: a register or a name, and the bytes to add to it."""

    base: str
    offset: int


# A register, an immediate value or a name is text; a vector of them is a tuple.
Operand: TypeAlias = str | tuple[str, ...] | Address


@dataclass(frozen=True, slots=True)
class Instruction:
    """A parsed instruction. `predicate` names the register that guards it, which counts inverted if `negated`."""

    opcode: str
    """The operation with its modifiers, as in `mad.wide.s32`; the key in the interpreter's tables."""
    name: str
    """The operation without its modifiers, as in `mad`."""
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    target: int | None
    """For a branch, the index of the instruction to which it goes; otherwise None."""
    text: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """A parsed kernel. `threads` is the number of threads of a program."""

    parameters: tuple[str, ...]
    registers: dict[str, str]
    """The types, by name, of the registers that inline assembly declares; others are typed by their prefix."""
    instructions: tuple[Instruction, ...]
    threads: int


def split(text: str) -> list[str]:
    """Return the parts between the commas that are outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def operand(text: str) -> Operand:
    """Parse one operand."""
    if text.startswith("{"):
        return tuple(split(text.strip("{} ")))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text


def parse(ptx: str) -> Kernel:
    """Parse a PTX module and return its one kernel."""
    entry = ptx.index(".visible .entry")
    opening = ptx.index("\n{", entry)
    head = ptx[entry:opening]
    threads = re.search(r"\.reqntid (\d+)", head)
    assert threads is not None, head
    registers: dict[str, str] = {}
    labels: dict[tuple[str, int], int] = {}
    statements: list[tuple[str, tuple[int, ...]]] = []
    # Inline assembly has its own scopes, in which the same label may occur again.
    scopes, number = [0], 0
    for raw in ptx[opening + 2 : ptx.index("$L__func_end0", opening)].splitlines():
        line = raw.partition("//")[0].strip()
        if line == "{":
            number += 1
            scopes.append(number)
        elif line == "}":
            scopes.pop()
        elif line.endswith(":"):
            labels[line[:-1], scopes[-1]] = len(statements)
        elif line.startswith(".reg"):
            _, kind, names = line.rstrip(";").split(None, 2)
            registers |= {name: kind for name in split(names) if "<" not in name}
        elif line and not line.startswith("."):
            statements += [(" ".join(part.split()), tuple(scopes)) for part in line.split(";") if part.strip()]
    instructions = tuple(instruction(text, inside, labels) for text, inside in statements)
    return Kernel(tuple(re.findall(r"(\w+_param_\d+)", head)), registers, instructions, int(threads[1]))


def instruction(text: str, scopes: tuple[int, ...], labels: dict[tuple[str, int], int]) -> Instruction:
    """Parse one instruction.

    scopes: the scopes around it, from outermost to innermost. labels: the index of a label's instruction, by the label
    and its scope.
    """
    match = re.fullmatch(r"(?:@(!?)([%\w]+) )?([\w.:]+) ?(.*)", text)
    assert match is not None, text
    negated, predicate, opcode, rest = match.groups()
    name, *modifiers = opcode.split(".")
    target = None
    if name == "bra":
        target = next(labels[rest, scope] for scope in reversed(scopes) if (rest, scope) in labels)
    operands = tuple(operand(part) for part in split(rest))
    return Instruction(opcode, name, tuple(modifiers), operands, predicate, negated == "!", target, text)
