"""What serving a model takes: one batch, its latency and price, and its neighbours side by side."""
