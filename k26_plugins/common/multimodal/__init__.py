"""Turn images and videos, from their bytes on, into the input of the vision tower."""
