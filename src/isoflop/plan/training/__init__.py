"""What training a model takes: the work, its seconds, energy and money, beside what others quoted."""
