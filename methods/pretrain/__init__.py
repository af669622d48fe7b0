"""Continued pre-training of chat and base models on plain text."""
