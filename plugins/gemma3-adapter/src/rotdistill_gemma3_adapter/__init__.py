"""Architecture table of Gemma 3's text decoder."""
