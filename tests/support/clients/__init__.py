"""Agent loops as the clients' own SDKs run them, against a server whose answers are made to order.

What they hold: the SDK reads every answer as it was written, streamed and not; and what it sends back, the model reads as
the core renders it.
"""
