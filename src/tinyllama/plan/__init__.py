"""What a recipe needs before it runs, and what this machine lacks for it."""
