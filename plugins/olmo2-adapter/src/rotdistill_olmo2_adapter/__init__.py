"""Architecture table of OLMo 2."""
