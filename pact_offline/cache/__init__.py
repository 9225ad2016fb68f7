"""The target cache: its format on disk, and all that reads and writes it."""
