"""The run that tests of programs start is one that benchmarks read."""

from tests.launch.conftest import arguments, folder, trained

__all__ = ["arguments", "folder", "trained"]
