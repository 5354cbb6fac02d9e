"""Ranks and what they send each other: who sits where, one collective by its algorithm, an exchange over a fabric."""
