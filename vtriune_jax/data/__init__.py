"""Data: rows of the V-Triune schema → samples → prompts."""
