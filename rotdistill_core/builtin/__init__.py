"""Steps that come with the core; they travel the same road as every other plugin."""
