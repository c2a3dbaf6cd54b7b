"""Evaluations of a model, while it trains and of a checkpoint."""
