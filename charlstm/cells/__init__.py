"""The recurrent cells: one file a cell, each with its textbook step, its fast recurrence and its reverse pass."""
