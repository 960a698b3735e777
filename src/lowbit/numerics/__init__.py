"""Numbers: formats, grids, codes, statistics. Imports torch and nothing else."""
