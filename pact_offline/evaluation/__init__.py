"""A model's answers, judged and counted: safety, utility and drift."""
