"""Fine-tuning: heads, step, batches by length, one run, many runs."""
