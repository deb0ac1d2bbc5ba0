"""Training: one resumable loop that knows no method and no recipe."""
