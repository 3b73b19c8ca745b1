"""The folder of a run, on disk or in a store: whose it is, who writes, what code it names."""
