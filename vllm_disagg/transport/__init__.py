"""Moves bytes between registered memory of two processes. Knows no request, no engine and no vLLM."""
