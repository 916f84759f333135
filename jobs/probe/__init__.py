"""Which layers of a LLaMA retrieve: what memory layers should be.

prompts.py  with answers far back
measure.py  one prompt in full attention
ranking.py  the order of the layers
probing.py  all of it, with its result
"""
