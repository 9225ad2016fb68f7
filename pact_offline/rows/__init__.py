"""Rows of chat data: from files to token ids and the contexts that they become."""
