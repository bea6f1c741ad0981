"""From raw text to the batches of one rank."""
