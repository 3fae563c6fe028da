"""Weights to and from Hugging Face and the original's TensorFlow 1 checkpoints."""
