"""The model that comes with Weft: the data it is trained on, how it is trained, and its weights."""
