"""Does it fit, what is the command, how fast can it be: answered from the configuration alone, without a GPU."""
