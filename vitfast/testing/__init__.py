"""What tests, `vitfast check` and benchmarks share: the error criterion, inputs, poisoned memory.

Nothing here imports pytest, and nothing in `vitfast.ops` or below imports this package.
"""
