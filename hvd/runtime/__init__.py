"""What a cluster tells a process of ours, and what it tells back: processes, owner, signals, exit records."""
