"""How trainers name the modules that a LoRA adapter is for: after the class that they load."""

from __future__ import annotations

# The hub's class has the checkpoint's names, transformers' own puts the language model into `model`, and one that loads the
# language model alone leaves its name out. The first beginning that fits counts.
SPELLINGS = {"model.language_model.": "language_model.model.", "model.": "language_model.model."}
