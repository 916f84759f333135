"""Work on a Ray cluster: submitted through its Jobs API, followed, stopped, run again; and what it takes.

package.py    recipe and code -> what is sent, and its id; job.py: its metadata
dashboard.py  Ray's dashboard over HTTP; nodes.py: what a cluster is
plan.py       `fot plan`: what a recipe's trainings take; needs.py: what a job needs of a cluster
entry.py      the driver on the cluster; preflight.py: what it checks first
watch.py      logs, followed; progress.py: stages, read from a log
kuberay.py    `fot manifest`: a recipe as a KubeRay RayJob or RayCronJob
"""
