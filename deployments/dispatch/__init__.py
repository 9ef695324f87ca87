"""From token ids to vectors, for anybody who asks: HTTP, jobs, batches."""
