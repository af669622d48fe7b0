"""A template: a trainer of transformers that reports through a callback."""
