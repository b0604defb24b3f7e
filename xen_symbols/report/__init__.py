"""The result model and its renderers."""
