"""The dictionary lookup task (paper, section 4.1): a small model from nothing, and how far its memory reaches."""
