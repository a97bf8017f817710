"""Helpers shared by tests; tests/conftest.py says how they are imported."""
