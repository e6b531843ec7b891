"""An example to watch and to read: a small scheduler, a worker, and real jobs, by worker_svc's public names alone.

`worker-svc demo` runs it. `scheduler` is as much of a scheduler as a worker needs; `story` uses the worker.
"""
