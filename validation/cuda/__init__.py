"""Everything that a machine with a GPU can tell, measured by one command: `python -m validation.cuda`."""
