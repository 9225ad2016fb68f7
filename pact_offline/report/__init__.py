"""Many metrics.json as one page."""
