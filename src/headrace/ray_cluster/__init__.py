"""Nodes on the machines of a Ray cluster: Ray places, restarts and rolls them, and no more.

Only this package imports `ray`, and only where it is used. `agent.py` keeps the node of a machine,
`manager.py` the number of agents and the list of nodes, `up.py` has the commands.
"""
