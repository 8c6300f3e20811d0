"""`python -m fewstep` is the command line."""

from fewstep.cli import main

main()
