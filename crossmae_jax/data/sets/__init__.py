"""Data sets that need more than a source: prepared, fetched or corrupted."""
