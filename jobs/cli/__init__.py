"""The `fot` command line, without heavy imports: `fot --help` answers at once.

fot.py       the command; options.py: what several commands take
recipes.py, jobs.py, models.py, data.py, registry.py, schedule.py: its commands by group, in click
commands/    what they do
views/       what they print
"""

from jobs.cli.fot import main as main
