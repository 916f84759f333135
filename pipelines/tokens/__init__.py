"""From documents to token shards: one Arrow file a unit of work, and the manifest that lists them.

tokenizer.py            train or bring a tokenizer; text to token ids
sentencepiece_model.py  tokenizers that are a tokenizer.model alone
gigatoken.py            a faster encoder; gigatoken_check.py: whether it makes the same tokens
long_text.py            texts of any length in bounded memory
minhash.py              signatures of texts
precheck.py             what is wrong with a corpus, found before anything is tokenized
tokenize.py             a Ray task a unit, a shard a task, exactly once
shards.py               shards and the manifest
growth.py               what a data set grows from
integrity.py            damage found and mended
"""
