"""The tasks of the training data, by what their prompts are made of."""
