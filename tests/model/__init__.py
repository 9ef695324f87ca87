"""Real models in real vLLM replicas, real clients in front."""
