"""Small checkpoints, adapters and drafts of the published structure, to try an engine with."""
