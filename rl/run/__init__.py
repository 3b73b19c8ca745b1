"""A run seen from outside: metrics, console, health, interrupts, saved programs."""
