"""Input of training: the token store, the data order and batches."""
