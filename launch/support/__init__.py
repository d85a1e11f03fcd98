"""What the programs have in common, and parts of single ones: nothing here is a command."""
