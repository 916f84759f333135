"""The LLaMA that is begun with: where it lies, whether it is whole, its shape, which of its parameters are trained.

base.py               a checkpoint read and checked; weights.py: its files' headers
checkpoint_source.py  where it lies, and what makes a directory of it; gguf.py: a GGUF file
shape.py              parameters by kind; layers.py: which layers see additional contexts
trained.py            which parameters are trained; backward.py: how far back gradients go
"""
