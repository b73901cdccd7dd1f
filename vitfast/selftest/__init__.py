"""Tests of GPU kernels where they are to run: in processes of their own, against float64.

A kernel that reads or writes outside its tensors may spoil the GPU context of the process that
launched it, for good, and one that waits for itself never ends. So that no user's process meets
either, problems (`problems`) go to workers (`workers`, `worker`), which judge them (`judge`) and
answer with verdicts (`vitfast.runtime.verdicts`).
"""
