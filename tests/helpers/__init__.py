"""What several tests use: places, tiny models, kills, hostile input, stores, and what writes the goldens anew."""
