"""Texts, read as sequences of tokens."""
