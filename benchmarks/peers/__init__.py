"""The contestants: functions that make one, each run in a process of its own (see benchmarks.worker)."""
