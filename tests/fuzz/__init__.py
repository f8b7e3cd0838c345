"""Readers are given damaged files and messages: `python -m tests.fuzz`."""
