"""From money, accelerators or days to a model, its tokens and the plan of its run."""
