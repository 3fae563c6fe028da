"""Command-line tools: measure and inspect."""
