"""One file per method: its network, its loss, its stages."""
