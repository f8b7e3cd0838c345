"""Commands are killed at random moments: `python -m tests.kills`."""
