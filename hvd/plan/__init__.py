"""Does a training run fit its devices? `hvd plan` (command.py)."""
