"""What this machine has, and what a recipe would miss on it."""
