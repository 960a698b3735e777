"""What a model is worth: perplexity, distance from the original, tasks and sizes."""
