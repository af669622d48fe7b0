"""Fine-tuning of models that make images, with SimpleTuner."""
