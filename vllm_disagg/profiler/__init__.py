"""Measures engines: what each step computed and how long it took."""
