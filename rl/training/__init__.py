"""From scored completions to new weights: packing, the train step, the update."""
