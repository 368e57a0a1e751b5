"""Starting the adapter in SGLang 0.5.10, which has no entry point for plugins: this folder, put on PYTHONPATH."""
