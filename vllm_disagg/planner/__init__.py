"""Decides how many instances, how parallel, and where; and whether to split at all. No I/O."""
