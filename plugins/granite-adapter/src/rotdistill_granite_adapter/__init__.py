"""Architecture table of Granite."""
