"""A launcher for a checkout: `python cli.py ...` is `gemma4-surgery ...`."""

from surgery.commands.app import main

if __name__ == "__main__":
    main()
