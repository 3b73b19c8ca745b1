"""Completions for others: an engine that takes requests from anywhere, and an HTTP interface to it."""
