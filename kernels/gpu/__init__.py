"""The attention side of DeepSeek-V4 as ops on device tensors: wrappers, what they promise, what runs them."""
