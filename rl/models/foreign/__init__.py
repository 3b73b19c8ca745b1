"""Models that are not the toolkit's own decoder: Tunix's, and a user's own module."""
