"""Where models are, loading them, and their log-probabilities at response steps."""
