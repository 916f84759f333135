"""What the commands do: a module a group of them. Heavy imports are at home here.

data.py evaluate.py probe.py registry.py schedule.py cluster.py
"""
