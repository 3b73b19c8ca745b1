"""`grpo quantize`: a model with weights of fewer bits, and what that costs."""
