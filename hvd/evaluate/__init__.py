"""Rollouts, action errors and credit assignment: `hvd evaluate` (command.py)."""
