"""Recipes that run again and again, by cron: on what is new since, with the champion going on. Files are the truth.

store.py    schedules as files; history.py: what they fired
firing.py   one firing: what is new, trained on from the champion, behind the gate
engine.py   Prefect, which fires them; the one module that knows it
serve.py    its server, and the process beside it
"""
