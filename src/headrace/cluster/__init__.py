"""Several machines as one service: nodes that hold pools, and fronts that route to them."""
