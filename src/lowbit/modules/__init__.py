"""Reference layers: what quantized models are made of when they run."""
