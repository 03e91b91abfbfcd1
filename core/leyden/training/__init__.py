"""The trainer: what it wires, what an algorithm sees of it, and what a run leaves behind."""
