"""Libraries that have some of the device ops, behind the same wrappers."""
