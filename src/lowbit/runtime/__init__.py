"""Running quantized models: loading them, and proving exports."""
