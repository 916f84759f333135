"""What every stage needs, whatever it makes: a store of outputs, Ray, progress, files, errors.

store.py        content-addressed outputs of stages
running.py      stages in order, through the store
cluster.py      Ray: a connection, many tasks, room for workers
environment.py  variables that are set before Ray is imported
progress.py     bars, rates, ETA; library noise to a file
visible.py      names and ids do nothing to a terminal
files.py        nothing half-written is ever visible
hashing.py      of JSON values and files
plugins.py      what users add by entry points
errors.py       a user's mistake
credentials.py  in URLs: found, refused, left out of what everybody may read
"""
