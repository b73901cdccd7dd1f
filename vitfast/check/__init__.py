"""What `vitfast check` runs: every op, backend and model family on this machine, and its faults."""
