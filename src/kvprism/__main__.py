"""`python -m kvprism`."""

from kvprism.cli import main

if __name__ == "__main__":
    main()
