"""The programs: absl flags and mains. Imports everything, is imported by nothing."""
