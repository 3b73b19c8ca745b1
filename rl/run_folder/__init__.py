"""The folder of a run, on disk or in a store: which run owns it, who may write, what code it names."""
