"""How measurements are summed up, shown and kept: quantiles, pictures, progress, JSON files, the machine. Knows no benchmark."""
