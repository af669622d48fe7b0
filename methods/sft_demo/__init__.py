"""Supervised fine-tuning with everything set for the sample data."""
