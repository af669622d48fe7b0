"""Supervised fine-tuning of models that read images and text."""
