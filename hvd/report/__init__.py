"""report.html of an experiment: `hvd report` (command.py)."""
