"""Looking inside a model while it runs as it always does: nothing here changes what it computes."""
