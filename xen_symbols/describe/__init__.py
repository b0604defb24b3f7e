"""What was read, as the JSON contract gives it (xen_symbols/report/schema.json): the only place that makes it."""
