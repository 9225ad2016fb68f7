"""Running the reference model over contexts that a store does not know yet."""
