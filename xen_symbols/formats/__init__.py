"""The layouts of files, whatever they are used for: the bytes of a file, ELF, its notes, compressions, magics."""
