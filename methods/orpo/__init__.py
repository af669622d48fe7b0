"""Odds ratio preference optimization of chat models."""
