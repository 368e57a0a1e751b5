"""How trainers name the modules that a LoRA adapter is for: after the class that they load."""

from __future__ import annotations

# What the hub's class, transformers' own and one of the language model alone call the language model.
BEGINNINGS = {"hub": "language_model.model.", "transformers": "model.language_model.", "text": "model."}
# What takes those beginnings' place in the checkpoint, whose names are the hub's. The first beginning that fits counts.
SPELLINGS = {"model.language_model.": "language_model.model.", "model.": "language_model.model."}
