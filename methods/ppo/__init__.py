"""Reinforcement learning of chat models with an actor and a critic (PPO)."""
