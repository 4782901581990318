"""Reading what others wrote, and writing so that a file or a folder appears at once or not at all."""
