"""The public page of the library in use, one script a subject."""
