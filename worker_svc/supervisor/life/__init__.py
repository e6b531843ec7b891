"""The life of every job that is not finished: a record for each state, with that state's fields and what it makes of
each event. Every move is made in `moves`, by the table in `job/lifecycle.py`. Imports go the way of a job, backwards:
`jobs` (accepted, taken over) → `starting` (queued, starting) → `running` (running, stopping) → `process` (its exit) →
`house` (its end, and what all states use)."""
