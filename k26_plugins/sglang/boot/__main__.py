"""Prints the folder that a user puts on PYTHONPATH."""

from pathlib import Path

print(Path(__file__).parent)
