"""What a model can do: each task gives cells (independent pieces of work) and a summary of their results.

tasks.py           the evaluations by name; cells.py: their pieces as Ray tasks, kept as they come
subject.py         what is evaluated, and reading into memory
perplexity.py      by context length; losses.py: intervals; text_bytes.py: a loss by bytes
passkey.py         a number found again; trials.py: its intervals
readers.py         how a long text is read: memory, or a rival; full_attention.py (YaRN, NTK), retrieval.py (BM25)
side_by_side.py    readers of the same windows and prompts in one table
attention_mass.py  r_d, what a query gives its own document
few_shot.py        trec.py, webquestions.py; questions.py: their data; asking.py: many questions of one memory
lm_eval_tasks.py   lm-evaluation-harness; harness.py: its model interface
dictionary/        the dictionary lookup task
"""
