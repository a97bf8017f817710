"""Programs on one event loop: the same `@sgl.function` objects, a greenlet in place of every thread."""
