"""Engines' kernels that `k26 tune` compares with: a module for each engine, which alone imports it, with its `PEERS`.

No server imports them. A release without one of their names has a row in the table that says so.
"""
