"""Use: what one does with a loaded model that reads: embed, fill, classify, answer. One file an action."""
