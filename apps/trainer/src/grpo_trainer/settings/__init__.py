"""Every setting of a run, and how files and the command line resolve to them."""
