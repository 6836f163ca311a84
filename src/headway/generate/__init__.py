"""Generating: how a trained model writes, token by token, with what it remembers kept between tokens."""
