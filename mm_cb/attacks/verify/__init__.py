"""Every number of an attack run computed again from its files."""
