"""What the crash path promises, by generation, and whether it kept it."""
