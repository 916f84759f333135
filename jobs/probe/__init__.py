"""Which layers of a LLaMA retrieve: what memory layers should be."""
