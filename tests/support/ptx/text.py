"""PTX text to instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Address:
    base: str
    offset: int


# A register, an immediate or a name as text, a vector as a tuple, an address.
Operand: TypeAlias = str | tuple[str, ...] | Address


@dataclass(frozen=True, slots=True)
class Instruction:
    opcode: str
    """The operation with its modifiers, `mad.wide.s32`: what the interpreter's tables are keyed by."""
    name: str
    """The operation alone: `mad`."""
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    target: int | None
    """The index of the instruction that a branch goes to."""
    text: str


@dataclass(frozen=True, slots=True)
class Kernel:
    parameters: tuple[str, ...]
    registers: dict[str, str]
    """Type by name, of the registers that inline assembly declares; the compiler's own are typed by their prefix."""
    instructions: tuple[Instruction, ...]
    threads: int


def split(text: str) -> list[str]:
    """The parts between the commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(split(text.strip("{} ")))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text


def parse(ptx: str) -> Kernel:
    """The one kernel of a module."""
    entry = ptx.index(".visible .entry")
    opening = ptx.index("\n{", entry)
    head = ptx[entry:opening]
    threads = re.search(r"\.reqntid (\d+)", head)
    assert threads is not None, head
    registers: dict[str, str] = {}
    labels: dict[tuple[str, int], int] = {}
    statements: list[tuple[str, tuple[int, ...]]] = []
    # Inline assembly has scopes of its own, in which the same label comes again.
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
    match = re.fullmatch(r"(?:@(!?)([%\w]+) )?([\w.:]+) ?(.*)", text)
    assert match is not None, text
    negated, predicate, opcode, rest = match.groups()
    name, *modifiers = opcode.split(".")
    target = None
    if name == "bra":
        target = next(labels[rest, scope] for scope in reversed(scopes) if (rest, scope) in labels)
    operands = tuple(operand(part) for part in split(rest))
    return Instruction(opcode, name, tuple(modifiers), operands, predicate, negated == "!", target, text)
