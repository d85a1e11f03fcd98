"""Code that the programs share, and parts of single ones: nothing here is a command."""
