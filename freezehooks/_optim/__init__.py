"""Around a step: what an optimizer's step hooks do, and its state."""
