"""From items to numbers with intervals."""
