"""The bare-metal reference guest."""
