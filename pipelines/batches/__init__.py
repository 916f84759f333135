"""From shards to batches: the batch of step t is a pure function of (manifest, recipe, seed, t).

index.py            where each document lies, what it copies, what it is used for
near_duplicates.py  documents whose signatures agree
fresh.py            documents that an earlier data set lacks
dataset.py          documents by number, any span of their tokens
packing.py          document groups of k contexts
mixture.py          which source a group comes from
sampler.py          the CrossBatch batch of a step
loader.py           as torch tensors, for a rank; the one module here that knows torch
"""
