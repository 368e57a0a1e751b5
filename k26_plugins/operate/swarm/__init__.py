"""An agent swarm as traffic: one orchestrator, hundreds of sub-agents with a shared prefix, tools between their turns."""
