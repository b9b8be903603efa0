"""Imported after all else: the garbage collector passes over what was imported, at every turn and in every fork."""

import gc

gc.collect()
gc.freeze()
