"""LoRA on Apple MLX."""
