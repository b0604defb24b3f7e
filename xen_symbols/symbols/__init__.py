"""Names and addresses of one build of Xen."""
