"""`python -m pensieve`."""

from pensieve.cli import main

if __name__ == "__main__":
    main()
