"""Every device op in Triton; nothing here is imported where Triton is not installed."""
