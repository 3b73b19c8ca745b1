"""From prompts to completions: the engine that draws tokens, and its plan."""
