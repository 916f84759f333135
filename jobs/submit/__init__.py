"""Work on a Ray cluster: submitted through its Jobs API, listed, followed, stopped, run again."""
