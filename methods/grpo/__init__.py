"""Reinforcement learning of chat models by rewards of groups of answers (GRPO)."""
