"""Which ranks send the weights, and which tensors each of them."""
