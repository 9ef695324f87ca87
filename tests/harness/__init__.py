"""What tests and benchmarks share: real servers, clusters of several nodes, worker files, checkpoints."""
