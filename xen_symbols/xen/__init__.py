"""Xen's own objects, found through a target."""
