"""Every device op in float64, plain torch."""
