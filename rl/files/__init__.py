"""How bytes reach a disk or a store, and how what others wrote is read without trusting it."""
