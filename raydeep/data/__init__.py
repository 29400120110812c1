"""Sources to shards, shards to ordered batches, batches to augmented tensors."""
