"""Circuit-breaker training: `recipe.load_recipe` says what to do, `run.train` does it."""
