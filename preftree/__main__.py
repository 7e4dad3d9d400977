"""`python -m preftree` is `preftree`."""

from preftree.cli import main

if __name__ == "__main__":
    main()
