"""How measurements are summed up, shown and kept: quantiles, pictures, progress, JSON files. Knows no
benchmark.
"""
