"""The versions of the outcomes database's tables, applied in order at start-up."""
