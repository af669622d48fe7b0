"""Reward models: what says how good an answer is."""
