"""Models that are not ours: Tunix's, and a user's own module."""
