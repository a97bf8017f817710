"""The APIs of others: OpenAI, Anthropic, SGLang."""
