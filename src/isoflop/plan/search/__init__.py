"""Search of all legal layouts: the formulas of a plan over arrays of sizes (numpy)."""
