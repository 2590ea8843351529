"""Over-refusal: benign requests that a breaker must go on answering."""
