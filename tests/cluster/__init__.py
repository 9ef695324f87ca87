"""A real Ray cluster on this machine, the fake engine in its replicas."""
