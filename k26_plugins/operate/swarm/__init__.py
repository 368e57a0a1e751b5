"""Put a server under the traffic of an agent swarm, and check that each agent gets its own answers.

One orchestrator splits a task among hundreds of sub-agents and merges their results. The sub-agents share a prompt
prefix and call tools between their turns.
"""
