"""Programs over HTTP: registered ones, and inline ones in JSON."""
