"""HTTP: the server, who may call it, how much at a time, and what goes over the wire."""
