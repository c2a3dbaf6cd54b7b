"""Models: pure Flax Linen modules. They are handed token ids and never sample."""
