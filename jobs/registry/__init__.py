"""The experiment registry: what was run, what came of it, and which model is the best so far. MLflow keeps it.

server.py    where MLflow is, whether it answers
record.py    an outcome as a run and a model version, once; gate.py: candidate or champion, and why
tracking.py  a training as a run, live, that can be continued
outbox.py    what MLflow could not be told yet; sync.py: tells it later
models.py    models:/fot/NAME@ALIAS, fetched once
runs.py      finding and filtering runs
"""
