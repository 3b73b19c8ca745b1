"""The machine: its devices as one mesh, its processes, its memory, and programs compiled for it."""
