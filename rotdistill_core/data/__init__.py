"""Texts: questions and blurbs as read and split, tokenised conversations, and how their tokens are packed into rows."""
