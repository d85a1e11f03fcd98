"""The cells, a file each: equations, forward step and hand-derived backward step."""
