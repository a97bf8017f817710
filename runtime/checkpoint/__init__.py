"""Checkpoints: what the files hold (`layout`), reading, writing and made-up weights.

Import the submodules: `layout` must stay importable without torch, so nothing is re-exported here.
"""
