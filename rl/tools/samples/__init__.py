"""`grpo sample` and `grpo replay`: completions of given prompts, and of recorded ones."""
