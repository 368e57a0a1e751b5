"""The commands of an operator, without an engine.

They answer whether a server computes the right thing (golden, verify), whether the model fits a machine and which
command serves it (plan), why something does not work (doctor), and whether a server stands the load of many agents
(swarm).
"""
