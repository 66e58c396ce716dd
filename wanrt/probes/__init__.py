"""Experiments that explain the parts of a model."""
