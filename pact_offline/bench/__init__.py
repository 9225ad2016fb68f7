"""Side-by-side measurements on one's own model and rows."""
