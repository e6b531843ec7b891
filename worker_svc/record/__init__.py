"""What is on record of jobs: the SQLite store and the directory that it lies in, for both processes."""
