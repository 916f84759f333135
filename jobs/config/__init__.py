"""Every part of a recipe: strict pydantic models, unknown keys are errors.

recipe.py           a recipe, whole; variants.py: several that differ in a few keys
training.py         base and fine-tuning; train_spec.py: what a training job is told
evaluation.py, registry.py, probe.py, dictionary.py: the parts of that name
checkpoint_name.py  what kind of thing a checkpoint's name says it is
settings.py         YAML, with --set on top, checked; yaml_text.py: YAML as meant
"""
