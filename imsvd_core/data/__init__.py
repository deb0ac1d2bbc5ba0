"""Images: in memory or streamed from disk, and the checks of what is there."""
