"""Checks on files that the project cannot carry: run by hand, their output kept in docs/validation/."""
