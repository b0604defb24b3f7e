"""Reports in each of the formats: a module for each, with `write`, `write_several`, and `SUFFIX`, of a file's name."""
