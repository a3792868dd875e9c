"""The engine that executes megatron-core's model; imported only where megatron-core is."""
