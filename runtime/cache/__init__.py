"""KV state of sequences: pools of pages, page ownership, and one sequence's view of them."""
