"""OpenAI's Batch API: files and batches in a storage, and the one runner that works them off."""
