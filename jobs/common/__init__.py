"""Small leaves that know nothing of recipes.

errors.py       exit codes, and the line a user sees of an error
stop.py         a stop that somebody asks of a job
child.py        servers as child processes
cron.py         cron lines and clocks
terminal.py     tables and sparklines
plot.py         curves, heat maps, panels
version.py      which code this is
"""
