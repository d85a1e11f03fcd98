"""Programs that read an exported folder, and are copied into it as they are: they import nothing of this project."""
