"""The unix socket between worker and supervisor, for both ends."""
