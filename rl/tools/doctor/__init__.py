"""`grpo doctor`: whether a run would start and fit here, and what to change."""
