"""What all contestants train by: Adam of this rate after clipping to this norm."""

LEARNING_RATE = 1e-3
CLIP = 1.0
