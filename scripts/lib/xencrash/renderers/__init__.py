"""Reports in each of the formats: a module for each, with `write` and `write_several`."""
