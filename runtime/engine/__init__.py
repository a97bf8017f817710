"""The engine: `front` is what callers hold, `core` owns model and state, `messages` is all that passes between."""
