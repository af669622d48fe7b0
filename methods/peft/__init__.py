"""Parameter-efficient fine-tuning of chat models: LoRA variants, IA3, trained prompts."""
