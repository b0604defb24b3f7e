"""What x86 Xen looks like in memory when it crashes. Never imports gdb."""

__version__ = "0.1.0"
