"""What servers answer besides vectors: Pharia's, vLLM's and text-embeddings-inference's other routes."""
