"""Provides the engines' kernels with which `k26 tune` compares the core's: `PEERS` in a module for each engine.

No server imports these modules, and only the module for an engine imports that engine. If a release lacks a name that a
kernel needs, the kernel's row in the table of `k26 tune` says so.
"""
