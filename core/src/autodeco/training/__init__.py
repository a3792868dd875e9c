"""Training the heads: data, batches, schedule, loop, checkpoints."""
