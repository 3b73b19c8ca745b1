"""The mathematics: advantages and losses, and what they are configured by."""
