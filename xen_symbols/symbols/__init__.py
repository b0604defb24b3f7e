"""Name ↔ address for one build of Xen, from an ELF symbol table, a `.map`, or the table inside Xen's image."""
