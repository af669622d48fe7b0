"""Kahneman-Tversky optimization of chat models."""
