"""The words of the domain, as frozen values and pure functions. Time is always an argument."""
