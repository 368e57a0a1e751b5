"""The core: what Kimi-K2.6 is, independent of any engine."""
