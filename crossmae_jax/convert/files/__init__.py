"""Weight files of other libraries, read and written; these know no model."""
