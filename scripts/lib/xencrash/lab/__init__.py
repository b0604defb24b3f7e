"""Real Xen, or a reference guest, in QEMU."""
