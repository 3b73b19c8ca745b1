"""The completions of a step, drawn, judged and formed into groups; evaluation."""
