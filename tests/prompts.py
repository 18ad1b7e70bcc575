"""Prompts and responses: what is trained, what is asked, where it ends, and the day of a template."""
