"""Recipes: their fields, their checks, and the YAML files that ship."""
