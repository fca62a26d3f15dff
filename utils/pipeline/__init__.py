"""Training: arguments, losses, the trainer and its callbacks."""
