"""How gdb reaches Xen. The only importer of gdb."""
