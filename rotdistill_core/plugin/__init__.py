"""What a plugin is made of: hook specifications, step classes, and the registry that finds
installed plugins."""
