"""Which engine and which options suit a model on this machine, by measuring them."""
