"""Vocabulary: the tokenizers of published checkpoints. `headway.text` holds those that are trained here."""

from headway.vocabulary.published import Encoding, PublishedTokenizer

__all__ = ["Encoding", "PublishedTokenizer"]
