"""The `vitfast` command: a module per sub-command, with `add_arguments(parser)` and `run(args)`."""
