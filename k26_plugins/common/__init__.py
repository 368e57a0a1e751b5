"""The core: everything about Kimi-K2.6 that does not depend on an inference engine."""
