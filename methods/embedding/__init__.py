"""Fine-tuning of models that turn texts into vectors."""
