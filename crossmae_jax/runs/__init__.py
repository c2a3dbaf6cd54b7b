"""The files of a run: who writes one stands beside who reads it."""
