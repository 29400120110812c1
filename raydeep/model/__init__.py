"""Networks by name, quantized and pruned layers, and the model folder."""
