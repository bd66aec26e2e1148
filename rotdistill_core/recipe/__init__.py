"""Recipes: the TOML document, the resolved recipe with its steps, loading with all errors at once,
and the JSON schema."""
