"""Code that the adapters of the engines share and nothing else needs."""
