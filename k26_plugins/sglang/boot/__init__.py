"""Makes the adapter active in SGLang 0.5.10, which has no entry point for plugins, if this folder is on PYTHONPATH."""
