"""What the crash path promises, generation by generation, and whether it was kept."""
