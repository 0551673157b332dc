"""From rows of text to batches of tokens."""
