"""`python -m golddiff` is the command `golddiff`."""

from .cli import main

if __name__ == "__main__":
    main()
