"""The DeepSeek-V4 network, inference only."""
