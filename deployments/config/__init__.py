"""Worker files → frozen models → plan. Imports neither Ray, torch nor vLLM."""
