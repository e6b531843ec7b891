"""What the kernel offers and the standard library lacks: processes, clocks, locks, threads. Knows nothing of jobs."""
