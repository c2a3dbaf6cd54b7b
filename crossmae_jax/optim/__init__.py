"""Optimisers, schedules, and rates that differ from block to block."""
