"""The seed programs, in NumPy alone: read these first."""
