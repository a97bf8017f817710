"""Assistant turns on an engine, whatever API asked for them."""
