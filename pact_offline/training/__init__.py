"""Fine-tuning a policy from cached targets."""
