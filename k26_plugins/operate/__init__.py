"""What an operator asks: is it right (golden, verify), does it fit (plan), why not (doctor), what do I run (serve)."""
