"""`python -m worker_svc` is the same as `worker-svc`."""

import sys

from worker_svc.cli import main

if __name__ == "__main__":
    sys.exit(main())
