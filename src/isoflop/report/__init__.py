"""Numbers as people see them: text tables and trees (text.py), figures (figures.py)."""
