"""Tests agent loops, as the clients' own SDKs run them, against a server whose answers are scripted.

The SDK must read every answer as the model wrote it, streamed and whole, and the model must read what the SDK sends
back as the core renders it.
"""
