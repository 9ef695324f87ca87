"""A file of texts → a file of vectors, with what was done kept on the way. See `embedding-cluster embed`."""
