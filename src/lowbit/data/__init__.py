"""Text to token ids: calibration samples and evaluation windows, from the package, files or the hub."""
