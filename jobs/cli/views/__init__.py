"""What the commands print: a module a group of them.

data.py registry.py schedule.py cluster.py
"""
