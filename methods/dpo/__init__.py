"""Direct preference optimization of chat models."""
