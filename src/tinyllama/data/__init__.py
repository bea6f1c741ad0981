"""What training reads: the token store, the order of its rows, and batches."""
