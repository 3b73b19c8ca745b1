"""The mathematics: advantages, losses, and how the configuration names them."""
