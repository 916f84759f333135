"""What training and evaluation measure with.

windows.py  which windows of which held-out documents
scoring.py  the losses of a window's tokens, read in memory
result.py   points, tables, plots: what every evaluation gives; tables.py: in the terminal
"""
