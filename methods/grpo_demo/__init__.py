"""GRPO with everything set for the sample data."""
