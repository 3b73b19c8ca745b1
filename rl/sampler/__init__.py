"""Draws completions of prompts: the engine, its plan, and the samplers built on it."""
