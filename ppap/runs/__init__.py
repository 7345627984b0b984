"""What a run leaves on disk and continues from: its directory, checkpoints, random state."""
