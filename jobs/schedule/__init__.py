"""Recipes that run again and again, by cron: on what is new since, with the champion going on. Files are the truth."""
