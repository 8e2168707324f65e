"""`python -m jaxserve`: the command line."""

from jaxserve.cli.main import main

main()
