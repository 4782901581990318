"""Faults injected into the code one at a time: what the tests and the proof say of each."""
