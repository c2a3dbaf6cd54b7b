"""Checkpoints on disk or in a bucket: complete, verified, and never half of one."""
