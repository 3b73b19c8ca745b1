"""A step's completions: drawn, judged, and formed into groups; evaluation."""
