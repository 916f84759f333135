"""Data as Ray tasks: corpus -> tokenizer -> token shards -> document groups -> CrossBatch batches.

Arrows of imports go down this list, never up:

    batches/     document groups, and the batch of every step
    tokens/      tokenizers, token shards, data sets that grow
    sources/     files and packages, and the documents in them
    config.py    the recipe's data parts; shares.py: slots in proportion to weights
    workflow/    stages kept by their content, Ray, progress, files
"""
