"""Supervised fine-tuning of chat models."""
