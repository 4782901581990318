"""`python -m surgery` is `gemma4-surgery`."""

from surgery.commands.app import main

if __name__ == "__main__":
    main()
