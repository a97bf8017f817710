"""From logits to tokens, and from tokens to text and a reason to stop."""
