"""What the machine gives: cores, memory, control groups, a folder for what was computed."""
