"""All stages of a recipe: what each makes, of what, by which function; run, told, reported.

run.py               `fot run`, `fot status`
workspace.py         a work_dir
stages.py            the stages of a recipe
data_stages.py, training_stages.py, probe_stage.py, evaluation_stages.py: its parts
dictionary_stages.py the dictionary task's recipe
start.py             where a training that continues a registered model begins
comparison.py        variants side by side
outcome.py           what a workflow came to; report.py: on one page
"""
