"""`python -m vitfast` is the `vitfast` command."""

import sys

from vitfast.cli.main import main

sys.exit(main())
