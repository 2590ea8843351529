"""Generation, the runners that measure models, and the statistics of what they measured."""
