"""The dictionary lookup task (paper, section 4.1): a small model from nothing, and how far its memory reaches.

task.py      its generator
train.py     a seed's training
accuracy.py  by tokens in memory
result.py    tables and plot of several seeds; cells.py: of a model of one's own
"""
