"""What runs have measured, side by side: read from their directories, as curves and as a page."""
