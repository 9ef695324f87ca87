"""Tests: unit (no Ray), app (ASGI, fake engine), cluster (local Ray), model (real vLLM)."""
