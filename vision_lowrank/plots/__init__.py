"""Pictures and map files of a run: arrays in, a file out."""
