"""Writing to a disk or a store, and reading without trust what others wrote."""
