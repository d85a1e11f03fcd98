"""What the project's speed, memory and scaling are, side by side with its peers.  Imported by nothing but tests."""
