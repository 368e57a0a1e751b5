"""How trainers name the modules that a LoRA adapter applies to.

The names depend on the model class that the trainer loads.
"""

from __future__ import annotations

# The prefix of the language model's modules in the hub's class, in transformers' own class and in a class of the
# language model alone.
BEGINNINGS = {"hub": "language_model.model.", "transformers": "model.language_model.", "text": "model."}
# The prefix in the checkpoint, whose names are the hub's, that replaces each of the other two. The first key that matches
# a name counts.
SPELLINGS = {"model.language_model.": "language_model.model.", "model.": "language_model.model."}
