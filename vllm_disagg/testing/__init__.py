"""Doubles and checks for tests, shipped for users too. Import the module you need."""
