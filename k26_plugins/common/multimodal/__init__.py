"""Images and videos, from bytes to the vision tower's input."""
