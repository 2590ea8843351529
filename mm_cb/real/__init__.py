"""A real model on a laptop: a small pretrained one, brought as a package, loses one harmless topic."""
