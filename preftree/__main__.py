"""`python -m preftree` is `preftree`."""

from preftree.cli import main

main()
