"""What can be seen of the cluster: what its processes count becomes the last minutes of each model."""
