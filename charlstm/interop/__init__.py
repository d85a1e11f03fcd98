"""Trained models in the formats of other programs, and models that other programs trained (docs/interop.md)."""
