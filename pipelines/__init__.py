"""Data as Ray tasks: corpus -> tokenizer -> token shards -> document groups -> CrossBatch batches; and the workflow."""
