"""The experiment registry: what was run, what came of it, and which model is the best so far. MLflow keeps it."""
