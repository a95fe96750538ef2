"""The versions of the outcomes database, applied in order at start."""
