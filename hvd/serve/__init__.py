"""A trained policy behind openpi's websocket protocol: `hvd serve` (command.py)."""
