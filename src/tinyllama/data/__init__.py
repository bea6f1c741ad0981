"""What training reads: the token store, the data order, batches."""
