"""Measurements of speed and memory. They print what they ran on; see README.md."""
