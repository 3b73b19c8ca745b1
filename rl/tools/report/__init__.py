"""`grpo report`: one or more runs as a page, as a picture, and as a table on the console."""
