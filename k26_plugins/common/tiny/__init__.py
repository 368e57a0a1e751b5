"""Make small checkpoints, adapters and drafts with the published structure, to try an engine with."""
