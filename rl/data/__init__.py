"""What is asked: rows of a data set become prompts of token ids."""
