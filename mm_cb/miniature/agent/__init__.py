"""The miniature agent: the same world with tools, errands and screens."""
