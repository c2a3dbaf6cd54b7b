"""Pages to look at: HTML in one file, and the page about a run."""
