"""Attacks on a model through its pictures, judged from the files they leave."""
