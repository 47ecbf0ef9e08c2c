"""The arithmetic of reinforcement learning: pure functions of numbers and tensors, each with its source."""
