"""What the crash harness is made of: jobs of known outcome, a client that never gives up, killers, and a judge."""
