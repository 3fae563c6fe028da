"""From text to batches: sources, tokenizer, token store, loader."""
